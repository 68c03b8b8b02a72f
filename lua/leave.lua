-- leave: a buyer waits in line no more.
--
-- KEYS   those of shared/change.lua
-- ARGV   1 caller (shared/partition.lua), 2 raw buyer id
-- Reply  { 'ok', now_ms, pseq, standing, word }
--          'done'     out of the line now
--          'already'  is not in it
--        { 'damaged', what is wrong with the round }
--        { 'fenced', reason } or { 'expired', now_ms }: nothing written
-- Flags  allow-oom: it gives memory back

local change, refusal = open_change(ARGV[1])
if not change then
  return refusal
end
local buyer = ARGV[2]
local wish = redis.call('HGET', KEYS[8], buyer)
if not wish then
  return answer(change, 'already')
end
local id = struct.unpack(WISH, wish)
note(change, 'leave', id, 0, buyer)
change.off_line = { buyer }
change.round.n_line = change.round.n_line - 1
return commit(change) or answer(change, 'done')
