-- The partition: its fence, its clock, and its journal. Joined in front of every script.
--
-- KEYS[1]  {p}:meta  hash  epoch, incarnation, pseq, last_ms

local function whole(number)
  -- '..' and tostring keep 14 digits only.
  return string.format('%.0f', number)
end

-- The caller's view of the partition, packed by engine/script.rs:
--   epoch         the timeline it learnt from PostgreSQL
--   floor         the highest pseq it has seen: Redis must not be behind it
--   expected_ms   its own estimate of Redis' clock
--   not_after_ms  past this instant the call must not have an effect any more
local CALLER = '>I4I6I6I6'

-- A clock this far behind the caller's estimate is a fault.
local CLOCK_JUMP_MS = 5000

-- Reads the partition and checks that this is the server, the timeline and the time that the
-- caller means. Returns the partition, or nil and the reply that says why not.
local function enter(caller)
  local epoch, floor, expected_ms, not_after_ms = struct.unpack(CALLER, caller)
  local meta = redis.pcall('HMGET', KEYS[1], 'epoch', 'incarnation', 'pseq', 'last_ms')
  if meta.err or not (meta[1] and meta[2] and meta[3] and meta[4]) then
    return nil, { 'fenced', 'meta' }
  end
  if tonumber(meta[1]) ~= epoch then
    return nil, { 'fenced', 'epoch' }
  end
  -- It changes on crash, restart and promotion: whoever answers now may have lost something.
  local replid = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
  if meta[2] ~= replid then
    return nil, { 'fenced', 'incarnation' }
  end
  local pseq = tonumber(meta[3])
  if pseq < floor then
    return nil, { 'fenced', 'behind' }
  end
  -- TIME once: it is not frozen inside a script. A clock that goes back does not take time back.
  local time = redis.call('TIME')
  local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
  now_ms = math.max(now_ms, tonumber(meta[4]))
  if now_ms < expected_ms - CLOCK_JUMP_MS then
    return nil, { 'fenced', 'clock' }
  end
  if now_ms > not_after_ms then
    return nil, { 'expired', whole(now_ms) }
  end
  return { epoch = epoch, pseq = pseq, now_ms = now_ms }
end
