-- limit: adds what this node has allowed to what all nodes have, for many limits in one call.
--
-- Runs on the Redis for what may be lost, never on the one that sells: no partition, no fence, no
-- journal. A key holds the instant at which an allowance is whole again (src/domain/allowance.rs),
-- in microseconds of this server's clock, and is gone when that has passed.
--
-- KEYS   one for each limit
-- ARGV   for each key: 1 what was spent, 2 the time in which all of it comes back; microseconds
-- Reply  for each key: microseconds until it is whole again
-- Flags  none

local time = redis.call('TIME')
local now_us = time[1] * 1000000 + time[2]
local gone = {}
for i, key in ipairs(KEYS) do
  local spent_us, whole_us = tonumber(ARGV[2 * i - 1]), tonumber(ARGV[2 * i])
  local gone_us = (tonumber(redis.call('GET', key)) or now_us) - now_us
  -- The bound is for a clock that was set back: it would shut somebody out for as long.
  gone_us = math.min(math.max(gone_us, 0), whole_us) + spent_us
  redis.call('SET', key, string.format('%.0f', now_us + gone_us), 'PX', math.ceil(gone_us / 1000))
  gone[i] = gone_us
end
return gone
