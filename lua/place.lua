-- place: where a buyer is in line.
--
-- KEYS   those of shared/change.lua
-- ARGV   1 caller (shared/partition.lua), 2 raw buyer id
-- Reply  { 'ok', now_ms, pseq, standing, place, units }
--          place  1 is next; '' outside the line
--          units  what the buyer waits for, at most; '' outside the line
--        { 'damaged', what is wrong with the round }
--        { 'fenced', reason } or { 'expired', now_ms }
-- Flags  no-writes

local change, refusal = open_change(ARGV[1])
if not change then
  return refusal
end
local rank = redis.call('ZRANK', KEYS[7], ARGV[2])
if not rank then
  return answer(change, '', '')
end
local _, _, units = struct.unpack(WISH, redis.call('HGET', KEYS[8], ARGV[2]))
return answer(change, whole(rank + 1), whole(units))
