"""What Redis is asked when limits are counted there: a script for each step, so that nobody comes between."""

from server.rates import WINDOW_S

_TIME = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

_WINDOW = (
    _TIME
    + f"""
-- A minute that begins with the first request after the last one: when it ends, and what was taken in it.
-- One that ends later than it can is of a clock that was set back since: it would last as long as that.
local function window(key)
  local ends, latest = tonumber(redis.call('HGET', key, 'ends')), now + {WINDOW_S * 1000}
  if ends and ends > now and ends <= latest then return ends, tonumber(redis.call('HGET', key, 'taken')) end
  ends = latest
  redis.call('HSET', key, 'ends', ends, 'taken', 0)
  redis.call('PEXPIREAT', key, ends)
  return ends, 0
end
"""
)

ENTER = (
    _WINDOW
    + """
-- KEYS: leases, requests. ARGV: most at once or 0, this lease, its ms, requests a minute or 0.
-- Which limit refuses it, how many were taken before it, and the ms until they are there again.
local at_once, limit, taken, left = tonumber(ARGV[1]), tonumber(ARGV[4]), 0, 0
if at_once > 0 then
  redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
  redis.call('ZREMRANGEBYSCORE', KEYS[1], '(' .. (now + ARGV[3]), '+inf')
  if redis.call('ZCARD', KEYS[1]) >= at_once then return {'at once', 0, 0} end
end
if limit > 0 then
  local ends
  ends, taken = window(KEYS[2])
  left = ends - now
  if taken >= limit then return {'requests', taken, left} end
  redis.call('HINCRBY', KEYS[2], 'taken', 1)
end
if at_once > 0 then
  redis.call('ZADD', KEYS[1], now + ARGV[3], ARGV[2])
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
end
return {'', taken, left}
"""
)

TAKE = (
    _WINDOW
    + """
-- KEYS: tokens. ARGV: tokens a minute, tokens.
-- 1 if they are refused, how many were taken before, the ms until they are there again, and when that is.
local limit, tokens = tonumber(ARGV[1]), tonumber(ARGV[2])
local ends, taken = window(KEYS[1])
if taken + math.min(tokens, limit) > limit then return {1, taken, ends - now, ends} end
redis.call('HINCRBY', KEYS[1], 'taken', tokens)
return {0, taken, ends - now, ends}
"""
)

LEAVE = (
    _WINDOW
    + """
-- KEYS: leases, tokens. ARGV: this lease or nothing, tokens beyond those counted, when the window of these ends.
if ARGV[1] ~= '' then redis.call('ZREM', KEYS[1], ARGV[1]) end
local more = tonumber(ARGV[2])
if more > 0 then
  window(KEYS[2])
  redis.call('HINCRBY', KEYS[2], 'taken', more)
elseif more < 0 and tonumber(redis.call('HGET', KEYS[2], 'ends')) == tonumber(ARGV[3]) then
  redis.call('HINCRBY', KEYS[2], 'taken', more)
end
"""
)

REFRESH = (
    _TIME
    + """
-- KEYS: leases. ARGV: their ms, and each. Redis may have lost them, so they are set and not only prolonged.
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], now + ARGV[1], ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
"""
)

FORGET = """
-- KEYS: leases. ARGV: each of them.
for i = 1, #ARGV do redis.call('ZREM', KEYS[1], ARGV[i]) end
"""
