-- audit: what Redis says of a round, and what the journal says of it.
--
-- KEYS   1 meta, 2 journal, 3 round, 4 buyers, 5 board, 6 sale, 7 orders, 8 ops
-- ARGV   1 caller (shared/partition.lua)
-- Reply  { 'ok', now_ms, pseq, standing, n_buyers, HLEN buyers, n_board, ZCARD board,
--          n_orders - n_archived, HLEN orders, n_ops, HLEN ops, id of the last entry that touched the round, its 'r' field or '' }
--        { 'ok', now_ms, pseq, '', allocation, remaining, held, sold, seq } of a round that is missing
--          or not whole: the fields as they stand there, '' for one that does not
--        { 'fenced', reason } or { 'expired', now_ms }
-- Flags  no-writes

local partition, refusal = enter(ARGV[1])
if not partition then
  return refusal
end

local function count(command, key)
  local n = redis.pcall(command, key)
  return type(n) == 'number' and whole(n) or '-1'
end

local round, sale = read_round(KEYS[3]), read_sale(KEYS[6])
if not round or not sale then
  local fields = redis.pcall('HMGET', KEYS[3], 'allocation', 'remaining', 'held', 'sold', 'seq')
  local reply = { 'ok', whole(partition.now_ms), whole(partition.pseq), '' }
  for i = 1, 5 do
    reply[#reply + 1] = fields[i] or ''
  end
  return reply
end
local entry_id, counters = journal_says(KEYS[3])
return { 'ok', whole(partition.now_ms), whole(partition.pseq),
  pack_standing(round, sale, partition.now_ms),
  whole(round.n_buyers), count('HLEN', KEYS[4]), whole(round.n_board), count('ZCARD', KEYS[5]),
  whole(sale.n_orders - sale.n_archived), count('HLEN', KEYS[7]),
  whole(sale.n_ops), count('HLEN', KEYS[8]), entry_id, counters }
