-- trim: takes entries out of the journal that PostgreSQL has had for a while.
--
-- KEYS   1 meta, 2 journal
-- ARGV   1 caller (shared/partition.lua), 2 pseq of the position, as PostgreSQL has just said it in
--        the caller's epoch, 3 entries before this instant may go (milliseconds since the epoch)
-- Reply  { 'ok', now_ms, pseq, entries taken out }: 0 when none may go, at most 1000 at a time
--        { 'fenced', reason } or { 'expired', now_ms }: nothing written
-- Flags  allow-oom: it gives memory back
-- The entry at the position always stays.

local partition, refusal = enter(ARGV[1])
if not partition then
  return refusal
end
local function entry_from(id)
  local found = redis.pcall('XRANGE', KEYS[2], id, '+', 'COUNT', 1)
  if found.err then
    return nil, true
  end
  return found[1]
end
local function parse(entry)
  local epoch, pseq = string.match(entry[1], '^(%d+)-(%d+)$')
  local at_ms
  for i = 1, #entry[2], 2 do
    if entry[2][i] == 't' then
      at_ms = tonumber(entry[2][i + 1])
    end
  end
  return tonumber(epoch), tonumber(pseq), at_ms
end
-- The entry of this number, or the first one after it. Numbers go on from epoch to epoch, ids do not.
local function entry_at(epoch, pseq)
  while true do
    local found = entry_from(whole(epoch) .. '-' .. whole(pseq))
    local found_epoch, found_pseq
    if found then
      found_epoch, found_pseq = parse(found)
    end
    if not found or found_pseq >= pseq then
      return found
    end
    epoch = found_epoch
  end
end

local position, before_ms = tonumber(ARGV[2]), tonumber(ARGV[3])
local first, wrong = entry_from('-')
if wrong or position > partition.pseq then
  return { 'fenced', wrong and 'journal' or 'behind' }
end
local removed = 0
if first then
  local epoch, oldest = parse(first)
  local step = 1000
  -- The first that stays: entries are as old as they are early, so few looks find one.
  while step >= 1 do
    local stays = entry_at(epoch, oldest + step)
    if stays then
      local _, pseq, at_ms = parse(stays)
      if pseq <= position and at_ms and at_ms < before_ms then
        removed = redis.call('XTRIM', KEYS[2], 'MINID', stays[1])
        break
      end
    end
    step = math.floor(step / 2)
  end
end
return { 'ok', whole(partition.now_ms), whole(partition.pseq), whole(removed) }
