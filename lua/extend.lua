-- extend: gives a held order its time once more, counted from now; once in its life.
--
-- KEYS   those of shared/change.lua
-- ARGV   1 caller (shared/partition.lua), 2 raw order id, 3 raw id of who asks
-- Reply  { 'ok', now_ms, pseq, standing, word, record }
--          'done'      it has more time now
--          'extended'  it was extended before
--          'already'   it is held no more: its status says what it is
--          'late'      its deadline has passed
--          'unknown'   there is no such order, or it has left; record is ''
--        { 'damaged', what is wrong with the round }
--        { 'fenced', reason } or { 'expired', now_ms }: nothing written
-- Flags  allow-oom: it changes a record in place

local change, refusal = open_change(ARGV[1])
if not change then
  return refusal
end
local order
order, refusal = held_order(change, ARGV[2])
if not order then
  return refusal
elseif order.extended_ms > 0 then
  return answer(change, 'extended', order.record)
end

order.extended_ms = math.max(1, change.partition.now_ms - order.accepted_ms)
order.until_ms = order.accepted_ms + order.hold_ms + order.extended_ms
change.on_hold = { whole(order.until_ms), order.id }
set_order(change, order)
note(change, 'extend', order.id, order.extended_ms, ARGV[3], nil, nil, true)
return commit(change) or answer(change, 'done', order.record)
