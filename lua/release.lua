-- release: gives an order, or some units of it, back. An operation has one effect.
--
-- KEYS   those of shared/change.lua
-- ARGV   1 caller (shared/partition.lua), 2 raw order id, 3 raw id of who asks
--        4 'cancel'    its units are for sale again
--          'withdraw'  the same, because the cart that it is of was not accepted as a whole
--          'return'    the money of a confirmed order goes back, and its units are for sale again
--          'refund'    the money goes back, and the units stay sold
--        5 units (0: all that are left), 6 raw operation id ('' for none), 7 fingerprint (8 bytes),
--        8 durability of what is offered to those in line (255: nothing is)
-- Reply  { 'ok', now_ms, pseq, standing, word, record }
--          'done'      it is so now
--          'replayed'  the operation was carried out before
--          'mismatch'  the operation was asked for with another request
--          'already'   nothing of it was left: it expired, or went back before
--          'held'      it is not paid, so there is no money to give back
--          'too_many'  it has fewer units left
--          'settled'   the round is settled or archived: no unit of it goes back any more; record is
--                      '' when the order has left
--          'unknown'   there is no such order; record is ''
--        { 'damaged', what is wrong with the round }
--        { 'fenced', reason } or { 'expired', now_ms }: nothing written
-- Flags  allow-oom: it gives memory back in the end

local change, refusal = open_change(ARGV[1])
if not change then
  return refusal
end
local round = change.round
local id, actor, word, asked = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local operation = ARGV[6] ~= '' and ARGV[6] or nil
local order, damage = read_order(change, id)

local function reply(answered)
  return answer(change, answered, order and order.record or '')
end

local known = operation and redis.call('HGET', KEYS[12], operation)
if known then
  return reply(struct.unpack(OPERATION, known) == ARGV[7] and 'replayed' or 'mismatch')
end
local settled = round.intent == 'settled' or round.intent == 'archived'
if not order then
  return reply(settled and 'settled' or 'unknown')
elseif order.status ~= STATUS.confirmed and order.status ~= STATUS.held then
  return reply('already')
elseif settled then
  return reply('settled')
elseif damage then
  return { 'damaged', damage }
end
local held, money = order.status == STATUS.held, word == 'return' or word == 'refund'
local left = order.quantity - order.returned - order.refunded
local units = asked == 0 and left or asked
if held and money then
  return reply('held')
elseif units > left then
  return reply('too_many')
end

if word == 'refund' then
  order.refunded = order.refunded + units
elseif not give_back(change, order, units) then
  return { 'damaged', 'buyer' }
end
if units == left then
  leave_status(change, order, money and 'refunded' or word == 'withdraw' and 'withdrawn' or 'cancelled')
end
set_order(change, order)
note(change, word, id, units, actor, operation, operation and ARGV[7], held)
if operation then
  change.operation = { operation, struct.pack(OPERATION, ARGV[7], round.seq) }
end
offer(change, 16, tonumber(ARGV[8]))
return commit(change) or reply('done')
