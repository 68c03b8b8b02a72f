-- restock: adds units to a round. An operation has one effect, however often it is asked for.
--
-- KEYS   1 meta, 2 journal, 3 round, 4 sale, 5 ops
-- ARGV   1 caller (shared/partition.lua), 2 units, 3 raw operation id, 4 fingerprint (8 bytes),
--        5 raw id of who asks
-- Reply  { 'ok', now_ms, pseq, standing, word }
--          'done'      the units are there
--          'replayed'  they came with an earlier attempt
--          'mismatch'  the operation was asked for with another request
--          'closed'    the round is closed
--          'too_many'  the allocation would leave its bounds
--        { 'damaged', what is wrong with the round }
--        { 'fenced', reason } or { 'expired', now_ms }: nothing written
-- Flags  none: refused when memory is full

local ALLOCATION_MAX = 10000000
-- fingerprint, seq
local OPERATION = '>c8I6'

local partition, refusal = enter(ARGV[1])
if not partition then
  return refusal
end
local round, sale = read_round(KEYS[3]), read_sale(KEYS[4])
if not round or not sale or redis.pcall('HLEN', KEYS[5]) ~= sale.n_ops then
  return { 'damaged', 'round' }
end

local function reply(word)
  return { 'ok', whole(partition.now_ms), whole(partition.pseq),
    pack_standing(round, sale, partition.now_ms), word }
end

local units, operation, fingerprint = tonumber(ARGV[2]), ARGV[3], ARGV[4]
local known = redis.call('HGET', KEYS[5], operation)
if known then
  return reply(struct.unpack(OPERATION, known) == fingerprint and 'replayed' or 'mismatch')
elseif state_of(round, partition.now_ms) == 'closed' then
  return reply('closed')
elseif round.allocation + units > ALLOCATION_MAX then
  return reply('too_many')
end

round.seq = round.seq + 1
round.allocation = round.allocation + units
round.remaining = round.remaining + units
if not append(partition, pack_counters(round), '',
    pack_event(0, round.seq, 'restock', nil, units, ARGV[5], operation)) then
  return { 'fenced', 'journal' }
end
redis.call('HSET', KEYS[5], operation, struct.pack(OPERATION, fingerprint, round.seq))
redis.call('HSET', KEYS[4], 'n_ops', whole(sale.n_ops + 1))
write_round(partition, round)
return reply('done')
