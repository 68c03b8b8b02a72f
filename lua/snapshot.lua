-- snapshot: where the units of some rounds are, at one instant.
--
-- KEYS   1 meta, then for each round: round, sale
-- ARGV   1 caller (shared/partition.lua)
-- Reply  { 'ok', now_ms, pseq, standing … }; '' for a round that is missing or not whole
--        { 'fenced', reason } or { 'expired', now_ms }
-- Flags  no-writes

local partition, refusal = enter(ARGV[1])
if not partition then
  return refusal
end
local reply = { 'ok', whole(partition.now_ms), whole(partition.pseq) }
for i = 2, #KEYS, 2 do
  local round, sale = read_round(KEYS[i]), read_sale(KEYS[i + 1])
  reply[#reply + 1] = round and sale and pack_standing(round, sale, partition.now_ms) or ''
end
return reply
