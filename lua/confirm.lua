-- confirm: a held order is paid, and bought from now on. The other end of a hold is sweep.lua; which
-- of the two comes first decides, by the clock of this server.
--
-- KEYS   those of shared/change.lua
-- ARGV   1 caller (shared/partition.lua), 2 raw order id, 3 raw id of who pays
-- Reply  { 'ok', now_ms, pseq, standing, word, record }
--          'done'     it is confirmed now
--          'already'  it is held no more: its status says what it is
--          'late'     its deadline has passed
--          'unknown'  there is no such order, or it has left; record is ''
--        { 'damaged', what is wrong with the round }
--        { 'fenced', reason } or { 'expired', now_ms }: nothing written
-- Flags  allow-oom: what is sold already must be payable

local change, refusal = open_change(ARGV[1])
if not change then
  return refusal
end
local order
order, refusal = held_order(change, ARGV[2])
if not order then
  return refusal
end

local round, units = change.round, order.quantity - order.returned
round.held, round.sold = round.held - units, round.sold + units
leave_status(change, order, 'confirmed')
set_order(change, order)
note(change, 'confirm', order.id, units, ARGV[3], nil, nil, true)
return commit(change) or answer(change, 'done', order.record)
