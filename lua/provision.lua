-- provision: creates a round with its stock.
--
-- KEYS   those of shared/change.lua
-- ARGV   1 caller (shared/partition.lua), 2 sale number, 3 round, 4 opens_ms, 5 closes_ms (0: none),
--        6 limit per buyer, 7 limit per order, 8 unit price (11 raw bytes), 9 hold_ms (0: none),
--        10 policy (shared/round.lua), 11 allocation
-- Reply  { 'ok', now_ms, pseq, word }
--          'created'   the round is there now
--          'exists'    it was there already, with the same rules
--          'conflict'  a round with other rules is there
--        { 'damaged', what is wrong with the round }
--        { 'fenced', reason } or { 'expired', now_ms }: nothing written
-- Flags  none: refused when memory is full
-- The first order of a fresh round has seq 1: provisioning takes none.

local partition, refusal = enter(ARGV[1])
if not partition then
  return refusal
end

local function reply(word)
  return { 'ok', whole(partition.now_ms), whole(partition.pseq), word }
end

local terms = { 'opens_ms', 'closes_ms', 'buyer_limit', 'order_limit', 'price', 'hold_ms', 'policy',
  'provisioned' }
if redis.call('EXISTS', KEYS[3]) == 1 then
  local known = redis.pcall('HMGET', KEYS[3], unpack(terms))
  if known.err then
    return { 'damaged', 'round' }
  end
  for i = 1, #terms do
    -- A round from before there were holds says nothing of them.
    local default = (terms[i] == 'hold_ms' or terms[i] == 'policy') and '0'
    if (known[i] or default) ~= ARGV[i + 3] then
      return reply('conflict')
    end
  end
  return reply('exists')
end
-- What a lost round left behind is not a fresh round.
if redis.call('EXISTS', KEYS[4], KEYS[5], KEYS[6], KEYS[7], KEYS[8]) > 0 then
  return { 'damaged', 'leftovers of a round' }
end
local sale
if redis.call('EXISTS', KEYS[9]) == 1 then
  sale = read_sale(KEYS[9])
  if not sale or not has_orders(sale, KEYS[10])
      or redis.pcall('HLEN', KEYS[12]) ~= sale.n_ops then
    return { 'damaged', 'sale' }
  end
elseif redis.call('EXISTS', KEYS[10], KEYS[11], KEYS[12]) > 0 then
  return { 'damaged', 'leftovers of a sale' }
end

local allocation = tonumber(ARGV[11])
local round = {
  key = KEYS[3], sale_number = tonumber(ARGV[2]), number = tonumber(ARGV[3]), intent = 'live',
  allocation = allocation, remaining = allocation, held = 0, sold = 0, seq = 0,
  n_buyers = 0, n_board = 0,
  hold_ms = tonumber(ARGV[9]), policy = tonumber(ARGV[10]), n_holds = 0, n_line = 0,
}
if not append(partition, pack_counters(round), '',
    pack_event(0, 0, 'provision', nil, allocation)) then
  return { 'fenced', 'journal' }
end
redis.call('HSET', KEYS[3], 'sale', ARGV[2], 'round', ARGV[3], 'opens_ms', ARGV[4],
  'closes_ms', ARGV[5], 'buyer_limit', ARGV[6], 'order_limit', ARGV[7], 'price', ARGV[8],
  'hold_ms', ARGV[9], 'policy', ARGV[10], 'provisioned', ARGV[11])
write_round(partition, round)
redis.call('HSET', KEYS[9], 'round', ARGV[3])
if not sale then
  redis.call('HSET', KEYS[9], 'n_orders', '0', 'n_ops', '0', 'n_buyers', '0')
end
return reply('created')
