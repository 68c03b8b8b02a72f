-- sweep: holds whose time is over end, and their units go to whoever waits in line, or on sale.
--
-- KEYS   those of shared/change.lua
-- ARGV   1 caller (shared/partition.lua), 2 holds at most, 3 buyers in line at most, 4 durability of
--        what is offered to them (255: nothing is)
-- Reply  { 'ok', now_ms, pseq, standing, holds that ended, orders that were offered,
--          the earliest deadline that is left, ms ('' for none) }
--        { 'damaged', what is wrong with the round }
--        { 'fenced', reason } or { 'expired', now_ms }: nothing written
-- Flags  allow-oom: it gives memory back in the end

local change, refusal = open_change(ARGV[1])
if not change then
  return refusal
end
local round = change.round
local due = round.n_holds > 0 and redis.call('ZRANGE', KEYS[6], '-inf',
  whole(change.partition.now_ms), 'BYSCORE', 'LIMIT', 0, ARGV[2]) or {}
for _, id in ipairs(due) do
  local order, damage = read_order(change, id)
  if not order or damage then
    return { 'damaged', damage or 'orders' }
  end
  local units = order.quantity - order.returned
  if not give_back(change, order, units) then
    return { 'damaged', 'buyer' }
  end
  leave_status(change, order, 'expired')
  set_order(change, order)
  note(change, 'expire', id, units, nil, nil, nil, true)
end
local offered = offer(change, tonumber(ARGV[3]), tonumber(ARGV[4]))
refusal = commit(change)
if refusal then
  return refusal
end
local next_hold = round.hold_ms > 0 and redis.call('ZRANGE', KEYS[6], 0, 0, 'WITHSCORES') or {}
return answer(change, whole(#due), whole(offered), next_hold[2] or '')
