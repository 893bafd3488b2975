"""A Llama's final hidden states as Transformers computes them in FP32, one layer of it in memory at a time.

All sequences go through a layer before the next is read: the weights of the whole are never there together, and
keys and values live as long as one prompt is in one layer. What computes is Transformers' own model, of a single
layer that becomes one after the other, so that a mask, a rotation and a norm are what they are there.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

_EMBEDDING = "model.embed_tokens.weight"


class Chats:
    """One prompt and what is read after it, each by itself: their hidden states, as far as they have come."""

    def __init__(self, prompt: Tensor, further: Sequence[Tensor]) -> None:
        """
        Args:
            prompt: [P, H], float32.
            further: of each answer, without its last token, [A − 1, H].
        """
        self._prompt = prompt
        self._further = list(further)

    def go_through(self, model: LlamaModel) -> None:
        """One layer on. The prompt is read once, and every answer goes on from its keys and values."""
        read = model(inputs_embeds=self._prompt.unsqueeze(0), use_cache=True)
        self._prompt = read.last_hidden_state[0]
        for place, given in enumerate(self._further):
            if len(given):
                cache = copy.deepcopy(read.past_key_values)  # it grows with what is read
                further = model(inputs_embeds=given.unsqueeze(0), past_key_values=cache, use_cache=True)
                self._further[place] = further.last_hidden_state[0]

    @property
    def predicting(self) -> list[Tensor]:
        """What predicts each answer's tokens, [A, H]: the prompt's last state and those of the answer."""
        return [torch.cat([self._prompt[-1:], given]) for given in self._further]


class LlamaByLayers:
    """A checkpoint of which one layer is in memory, in FP32."""

    def __init__(self, checkpoint: Path) -> None:
        self._file_of: dict[str, Path] = {}
        for file in sorted(checkpoint.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                self._file_of |= dict.fromkeys(tensors.keys(), file)
        self.layers: int = LlamaConfig.from_pretrained(checkpoint).num_hidden_layers
        config = LlamaConfig.from_pretrained(checkpoint, num_hidden_layers=1)
        with torch.device("meta"):
            self._model = LlamaModel(config).eval().float()
        self._model.layers.to_empty(device="cpu")
        self._model.rotary_emb = LlamaRotaryEmbedding(config)
        self._norm, self._model.norm = self._model.norm.to_empty(device="cpu"), nn.Identity()

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Rows of the embedding, [T, H], float32; the rest of it is not read."""
        with safe_open(self._file_of[_EMBEDDING], framework="pt") as tensors:
            rows: Tensor = tensors.get_tensor(_EMBEDDING)[torch.tensor(tokens, dtype=torch.int64)]
        return rows.float()

    @torch.inference_mode()
    def read(self, chats: Sequence[Chats], say: Callable[[int], None]) -> None:
        """Take embedded chats through all layers and the last norm; ``say`` is told the number of each layer."""
        for number in range(self.layers):
            say(number)
            self._fill(self._model.layers[0], f"model.layers.{number}")
            if number == self.layers - 1:
                self._fill(self._norm, "model.norm")
                self._model.norm = self._norm
            for each in chats:
                each.go_through(self._model)

    def _fill(self, module: nn.Module, name: str) -> None:
        for part, parameter in module.named_parameters():
            whole = f"{name}.{part}"
            # Opened anew each time: what of a file has been read stays mapped until it is closed.
            with safe_open(self._file_of[whole], framework="pt") as tensors:
                parameter.copy_(tensors.get_tensor(whole))
