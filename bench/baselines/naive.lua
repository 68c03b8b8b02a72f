-- One purchase, decided as the usual design does it: one call, one order.
--
-- KEYS   1 sale, 2 units of each buyer, 3 order of each key, 4 journal
-- ARGV   1 buyer, 2 idempotency key, 3 quantity, 4 id of the order, 5 now in ms,
--        6 sale
-- Reply  { word, order }

local idempotency = ARGV[1] .. ' ' .. ARGV[2]
local known = redis.call('HGET', KEYS[3], idempotency)
if known then
  return { 'replayed', known }
end
local sale = redis.call('HMGET', KEYS[1], 'remaining', 'limit', 'opens_ms')
if not sale[1] then
  return { 'not_found', '' }
end
local remaining, quantity = tonumber(sale[1]), tonumber(ARGV[3])
if tonumber(ARGV[5]) < tonumber(sale[3]) then
  return { 'not_open', '' }
end
local units = tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or '0')
if units + quantity > tonumber(sale[2]) then
  return { 'buyer_limit', '' }
end
if remaining == 0 then
  return { 'sold_out', '' }
elseif remaining < quantity then
  return { 'insufficient', '' }
end

redis.call('HINCRBY', KEYS[1], 'remaining', -quantity)
local seq = redis.call('HINCRBY', KEYS[1], 'seq', 1)
redis.call('HINCRBY', KEYS[2], ARGV[1], quantity)
local order = ARGV[4] .. ' ' .. ARGV[3] .. ' ' .. seq .. ' ' .. ARGV[5]
redis.call('HSET', KEYS[3], idempotency, order)
redis.call('XADD', KEYS[4], '*', 'sale', ARGV[6], 'buyer', ARGV[1], 'key', ARGV[2],
  'order', order)
return { 'accepted', order }
