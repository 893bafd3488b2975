"""The bench counts right answers only."""

import httptools
import pytest

from tests.bench import upstream
from tests.bench.answers import Answer, WrongAnswer, check_stream, check_whole

TOKENS = 8


def answer_of(data: bytes) -> Answer:
    """What the load generator makes of these bytes."""
    answer = Answer()

    class Body:
        def on_body(self, body: bytes) -> None:
            answer.body += body

    parser = httptools.HttpResponseParser(Body())
    parser.feed_data(data)
    answer.status = parser.get_status_code()
    return answer


@pytest.fixture
def writes() -> list[bytes]:
    """A whole stream, as the upstream writes it."""
    return list(upstream.stream(TOKENS, True))


def test_what_the_upstream_sends_is_right(writes: list[bytes]) -> None:
    check_whole(answer_of(upstream.whole()))
    assert check_stream(answer_of(b"".join(writes)), TOKENS) == upstream.tokens_of(TOKENS)


def test_an_answer_with_another_status_is_wrong() -> None:
    with pytest.raises(WrongAnswer, match="429"):
        check_whole(answer_of(upstream.whole().replace(b"200 OK", b"429 No")))


def test_an_answer_with_another_text_is_wrong() -> None:
    with pytest.raises(WrongAnswer, match="another text"):
        check_whole(answer_of(upstream.whole().replace(b" sky", b" sea")))


def test_a_stream_with_a_chunk_missing_shows_it(writes: list[bytes]) -> None:
    del writes[3]
    assert check_stream(answer_of(b"".join(writes)), TOKENS) != upstream.tokens_of(TOKENS)


def test_a_stream_without_an_end_is_wrong(writes: list[bytes]) -> None:
    with pytest.raises(WrongAnswer, match="ended with"):
        check_stream(answer_of(b"".join(writes[:-1])), TOKENS)


def test_a_stream_that_keeps_its_usage_back_is_wrong() -> None:
    with pytest.raises(WrongAnswer, match="usage"):
        check_stream(answer_of(b"".join(upstream.stream(TOKENS, False))), TOKENS)
