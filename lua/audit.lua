-- audit: what Redis says of a round, and what the journal says of it.
--
-- KEYS   those of shared/change.lua
-- ARGV   1 caller (shared/partition.lua)
-- Reply  { 'ok', now_ms, pseq, standing, n_buyers, HLEN buyers, n_board, ZCARD board,
--          n_orders - n_archived, HLEN orders, n_ops, HLEN ops, n_holds, ZCARD holds, n_line,
--          ZCARD line, earliest deadline of a hold ('' for none), id of the last entry that touched the round, its 'r' field or '' }
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

local round, sale = read_round(KEYS[3]), read_sale(KEYS[9])
if not round or not sale then
  local fields = redis.pcall('HMGET', KEYS[3], 'allocation', 'remaining', 'held', 'sold', 'seq')
  local reply = { 'ok', whole(partition.now_ms), whole(partition.pseq), '' }
  for i = 1, 5 do
    reply[#reply + 1] = fields[i] or ''
  end
  return reply
end
local entry_id, counters = journal_says(KEYS[3])
local first = redis.pcall('ZRANGE', KEYS[6], 0, 0, 'WITHSCORES')
local over_sale = has(round.policy, LIMIT_OVER_SALE)
return { 'ok', whole(partition.now_ms), whole(partition.pseq),
  pack_standing(round, sale, partition.now_ms),
  whole(over_sale and sale.n_buyers or round.n_buyers), count('HLEN', KEYS[over_sale and 11 or 4]),
  whole(round.n_board), count('ZCARD', KEYS[5]),
  whole(sale.n_orders - sale.n_archived), count('HLEN', KEYS[10]),
  whole(sale.n_ops), count('HLEN', KEYS[12]), whole(round.n_holds), count('ZCARD', KEYS[6]),
  whole(round.n_line), count('ZCARD', KEYS[7]), first[2] or '', entry_id, counters }
