-- archive: takes a settled round out of Redis. PostgreSQL has all of it, and answers from now on.
--
-- The first call leaves of the round only its own hash; it and further ones take orders out of the
-- sale's order book, some at a time. Orders that are gone already cost nothing.
--
-- KEYS   those of shared/change.lua
-- ARGV   1 caller (shared/partition.lua), 2 raw ids of orders of the round, 500 at most
-- Reply  { 'ok', now_ms, pseq, standing, word, orders taken out }
--          'done'       the round is archived, and has none of these orders
--          'unsettled'  it is not settled
--        { 'damaged', what is wrong with the round }
--        { 'fenced', reason } or { 'expired', now_ms }: nothing written
-- Flags  allow-oom: it gives memory back

local partition, refusal = enter(ARGV[1])
if not partition then
  return refusal
end
local round, sale = read_round(KEYS[3]), read_sale(KEYS[9])
if not round or not sale or not intact(round, KEYS[4], KEYS[5], KEYS[6])
    or not has_orders(sale, KEYS[10]) then
  return { 'damaged', 'round' }
end

local function reply(word, orders)
  return { 'ok', whole(partition.now_ms), whole(partition.pseq),
    pack_standing(round, sale, partition.now_ms), word, whole(orders) }
end

if round.intent ~= 'settled' and round.intent ~= 'archived' then
  return reply('unsettled', 0)
end
local ids = {}
for at = 1, #ARGV[2], 16 do
  ids[#ids + 1] = string.sub(ARGV[2], at, at + 15)
end
local leaving = {}
if #ids > 0 then
  local records = redis.call('HMGET', KEYS[10], unpack(ids))
  for i, id in ipairs(ids) do
    if records[i] and round_of(records[i]) ~= round.number then
      return { 'damaged', 'an order of another round' }
    elseif records[i] then
      leaving[#leaving + 1] = id
    end
  end
end

if round.intent == 'settled' then
  round.intent = 'archived'
  round.seq = round.seq + 1
  round.n_buyers, round.n_board, round.n_line = 0, 0, 0
  if not append(partition, pack_counters(round), '', pack_event(0, round.seq, 'archive', nil, 0)) then
    return { 'fenced', 'journal' }
  end
  -- Before the first order leaves: from now on PostgreSQL is asked for orders that are not here.
  sale.archived_rounds = sale.archived_rounds + 1
  redis.call('HSET', KEYS[9], 'archived_rounds', whole(sale.archived_rounds))
  redis.call('UNLINK', KEYS[4], KEYS[5], KEYS[6], KEYS[7], KEYS[8])
  write_round(partition, round)
end
if #leaving > 0 then
  redis.call('HDEL', KEYS[10], unpack(leaving))
  redis.call('HSET', KEYS[9], 'n_archived', whole(sale.n_archived + #leaving))
end
return reply('done', #leaving)
