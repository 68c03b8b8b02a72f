-- settle: from now on no unit of a round that is over goes back, so its orders are final.
--
-- KEYS   1 meta, 2 journal, 3 round, 4 sale
-- ARGV   1 caller (shared/partition.lua)
-- Reply  { 'ok', now_ms, pseq, standing, word }
--          'done'     it is settled now
--          'already'  it was settled before
--          'open'     it is not over
--          'held'     it is over, and orders of it wait for their payment
--        { 'damaged', what is wrong with the round }
--        { 'fenced', reason } or { 'expired', now_ms }: nothing written
-- Flags  allow-oom: it is the first step of giving memory back

local partition, refusal = enter(ARGV[1])
if not partition then
  return refusal
end
local round, sale = read_round(KEYS[3]), read_sale(KEYS[4])
if not round or not sale then
  return { 'damaged', 'round' }
end

local function reply(word)
  return { 'ok', whole(partition.now_ms), whole(partition.pseq),
    pack_standing(round, sale, partition.now_ms), word }
end

if round.intent == 'settled' or round.intent == 'archived' then
  return reply('already')
elseif state_of(round, partition.now_ms) ~= 'closed' then
  return reply('open')
elseif round.held > 0 then
  return reply('held')
end

round.intent = 'settled'
round.seq = round.seq + 1
if not append(partition, pack_counters(round), '', pack_event(0, round.seq, 'settle', nil, 0)) then
  return { 'fenced', 'journal' }
end
write_round(partition, round)
return reply('done')
