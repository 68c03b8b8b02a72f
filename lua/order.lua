-- order: looks up one order of a sale.
--
-- KEYS   1 meta, 2 sale, 3 orders
-- ARGV   1 caller (shared/partition.lua), 2 raw order id
-- Reply  { 'ok', now_ms, pseq, record }; record is '' when there is no such order, or it
--          has left with an archived round
--        { 'damaged', what is wrong with the round }
--        { 'fenced', reason } or { 'expired', now_ms }
-- Flags  no-writes

local partition, refusal = enter(ARGV[1])
if not partition then
  return refusal
end
local sale = read_sale(KEYS[2])
if not sale or not has_orders(sale, KEYS[3]) then
  return { 'damaged', 'orders' }
end
return { 'ok', whole(partition.now_ms), whole(partition.pseq),
  redis.call('HGET', KEYS[3], ARGV[2]) or '' }
