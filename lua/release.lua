-- release: gives an order back; its units are for sale again.
--
-- KEYS   1 meta, 2 journal, 3 round, 4 buyers, 5 board, 6 sale, 7 orders
-- ARGV   1 caller (shared/partition.lua), 2 raw order id, 3 raw id of who asks
-- Reply  { 'ok', now_ms, pseq, standing, word, record }
--          'done'     it is cancelled now
--          'already'  its units had gone back before
--          'settled'  the round is settled or archived: no unit of it goes back any more; record is
--                     '' when the order has left
--          'unknown'  there is no such order; record is ''
--        { 'damaged', what is wrong with the round }
--        { 'fenced', reason } or { 'expired', now_ms }: nothing written
-- Flags  allow-oom: it gives memory back in the end

local partition, refusal = enter(ARGV[1])
if not partition then
  return refusal
end
local round, sale = read_round(KEYS[3]), read_sale(KEYS[6])
if not round or not sale or not intact(round, KEYS[4], KEYS[5])
    or not has_orders(sale, KEYS[7]) then
  return { 'damaged', 'round' }
end

local id = ARGV[2]
local record = redis.call('HGET', KEYS[7], id)

local function reply(word)
  return { 'ok', whole(partition.now_ms), whole(partition.pseq),
    pack_standing(round, sale, partition.now_ms), word, record or '' }
end

local settled = round.intent == 'settled' or round.intent == 'archived'
if not record then
  return reply(settled and 'settled' or 'unknown')
end
local status, seq, quantity, buyer_id = unpack_record(record)
if status ~= STATUS.confirmed then
  return reply('already')
elseif settled then
  return reply('settled')
end
local packed = redis.call('HGET', KEYS[4], buyer_id)
if not packed then
  return { 'damaged', 'buyer' }
end
local units, acceptances = struct.unpack(BUYER, packed)
if units < quantity or round.sold < quantity
    or redis.call('ZSCORE', KEYS[5], id) ~= whole(seq) then
  return { 'damaged', 'order' }
end

round.seq = round.seq + 1
round.remaining = round.remaining + quantity
round.sold = round.sold - quantity
round.n_board = round.n_board - 1
record = with_status(record, 'cancelled')

if not append(partition, pack_counters(round), '',
    pack_event(0, round.seq, 'cancel', id, quantity, ARGV[3])) then
  return { 'fenced', 'journal' }
end
redis.call('HSET', KEYS[7], id, record)
redis.call('HSET', KEYS[4], buyer_id, struct.pack(BUYER, units - quantity, acceptances))
redis.call('ZREM', KEYS[5], id)
write_round(partition, round)
return reply('done')
