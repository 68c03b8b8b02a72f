-- control: pauses, resumes or closes a round.
--
-- KEYS   1 meta, 2 journal, 3 round, 4 sale
-- ARGV   1 caller (shared/partition.lua), 2 'live' | 'paused' | 'closed', 3 raw id of who asks
-- Reply  { 'ok', now_ms, pseq, standing, word }
--          'done'     it is so now
--          'already'  it was so before
--          'closed'   the round is closed, and stays so
--        { 'damaged', what is wrong with the round }
--        { 'fenced', reason } or { 'expired', now_ms }: nothing written
-- Flags  allow-oom: selling can be stopped whatever happens

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

local intent = ARGV[2]
if state_of(round, partition.now_ms) == 'closed' then
  return reply(intent == 'closed' and 'already' or 'closed')
elseif round.intent == intent then
  return reply('already')
end

round.intent = intent
round.seq = round.seq + 1
local kind = ({ live = 'resume', paused = 'pause', closed = 'close' })[intent]
if not append(partition, pack_counters(round), '',
    pack_event(0, round.seq, kind, nil, 0, ARGV[3])) then
  return { 'fenced', 'journal' }
end
write_round(partition, round)
return reply('done')
