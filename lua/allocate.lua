-- allocate: adds units to a round, or takes some that remain. An operation has one effect, however
-- often it is asked for.
--
-- KEYS   those of shared/change.lua
-- ARGV   1 caller (shared/partition.lua), 2 'restock' | 'reduce', 3 units, 4 raw operation id,
--        5 fingerprint (8 bytes), 6 raw id of who asks,
--        7 durability of what is offered to those in line (255: nothing is)
-- Reply  { 'ok', now_ms, pseq, standing, word }
--          'done'      it is so now
--          'replayed'  an earlier attempt did it
--          'mismatch'  the operation was asked for with another request
--          'closed'    the round is closed
--          'too_many'  the allocation would leave its bounds, or fewer units remain
--        { 'damaged', what is wrong with the round }
--        { 'fenced', reason } or { 'expired', now_ms }: nothing written
-- Flags  none: refused when memory is full

local ALLOCATION_MAX = 10000000

local change, refusal = open_change(ARGV[1])
if not change then
  return refusal
end
local round = change.round
local kind, units, operation, fingerprint = ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
local known = redis.call('HGET', KEYS[12], operation)
if known then
  return answer(change, struct.unpack(OPERATION, known) == fingerprint and 'replayed' or 'mismatch')
elseif state_of(round, change.partition.now_ms) == 'closed' then
  return answer(change, 'closed')
end
local signed = kind == 'restock' and units or -units
if round.allocation + signed > ALLOCATION_MAX or round.remaining + signed < 0 then
  return answer(change, 'too_many')
end

round.allocation = round.allocation + signed
round.remaining = round.remaining + signed
note(change, kind, nil, units, ARGV[6], operation, fingerprint)
change.operation = { operation, struct.pack(OPERATION, fingerprint, round.seq) }
offer(change, 16, tonumber(ARGV[7]))
return commit(change) or answer(change, 'done')
