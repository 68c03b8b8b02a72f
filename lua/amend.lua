-- amend: changes the rules of a round. Before it opens all of them; later only when it ends.
--
-- KEYS   those of shared/change.lua
-- ARGV   1 caller (shared/partition.lua), 2 raw id of who asks, 3 opens_ms, 4 closes_ms (0: none),
--        5 limit per buyer, 6 limit per order, 7 unit price (11 raw bytes), 8 hold_ms (0: none)
-- Reply  { 'ok', now_ms, pseq, standing, word }
--          'done'     it has these rules now
--          'already'  it had them before
--          'closed'   the round is closed
--          'open'     it is open, and something else than its end would change
--          'past'     the end would lie in the past
--        { 'damaged', what is wrong with the round }
--        { 'fenced', reason } or { 'expired', now_ms }: nothing written
-- Flags  none: refused when memory is full

-- index of the round in the entry, seq, opens_ms, closes_ms, limit per buyer, limit per order, price,
-- hold_ms
local TERMS = '>BI6I6I6I4I4c11I4'

local change, refusal = open_change(ARGV[1])
if not change then
  return refusal
end
local round, now_ms = change.round, change.partition.now_ms
local asked = {
  opens_ms = tonumber(ARGV[3]), closes_ms = tonumber(ARGV[4]), buyer_limit = tonumber(ARGV[5]),
  order_limit = tonumber(ARGV[6]), price = ARGV[7], hold_ms = tonumber(ARGV[8]),
}
local changed, end_only = false, true
for name, value in pairs(asked) do
  if round[name] ~= value then
    changed = true
    end_only = end_only and name == 'closes_ms'
  end
end
local state = state_of(round, now_ms)
if state == 'closed' then
  return answer(change, 'closed')
elseif not changed then
  return answer(change, 'already')
elseif state ~= 'scheduled' and not end_only then
  return answer(change, 'open')
elseif asked.closes_ms > 0 and asked.closes_ms <= now_ms then
  return answer(change, 'past')
end

for name, value in pairs(asked) do
  round[name] = value
end
note(change, 'amend', nil, 0, ARGV[2])
change.terms = struct.pack(TERMS, 0, round.seq, round.opens_ms, round.closes_ms, round.buyer_limit,
  round.order_limit, round.price, round.hold_ms)
refusal = commit(change)
if refusal then
  return refusal
end
redis.call('HSET', round.key, 'opens_ms', ARGV[3], 'closes_ms', ARGV[4], 'buyer_limit', ARGV[5],
  'order_limit', ARGV[6], 'price', ARGV[7], 'hold_ms', ARGV[8])
return answer(change, 'done')
