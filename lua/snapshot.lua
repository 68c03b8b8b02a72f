-- snapshot: where the units of some rounds are, at one instant.
--
-- KEYS   1 meta, 2 … round
-- ARGV   1 caller (shared/partition.lua)
-- Reply  { 'ok', now_ms, pseq, standing … }; '' for a round that is missing or not whole
--        { 'fenced', reason } or { 'expired', now_ms }
-- Flags  no-writes

local partition, refusal = enter(ARGV[1])
if not partition then
  return refusal
end
local reply = { 'ok', whole(partition.now_ms), whole(partition.pseq) }
for i = 2, #KEYS do
  local round = read_round(KEYS[i])
  reply[#reply + 1] = round and pack_standing(round, partition.now_ms) or ''
end
return reply
