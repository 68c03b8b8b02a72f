-- leaderboard: a page of a round's confirmed orders, in order of purchase.
--
-- KEYS   1 meta, 2 round, 3 buyers, 4 board, 5 orders, 6 holds
-- ARGV   1 caller (shared/partition.lua), 2 seq to start after, 3 entries at most,
--        4 entries before that to start with
-- Reply  { 'ok', now_ms, pseq, entries before the page, then raw id and record of each }
--        { 'ok', now_ms, pseq, 'archived' }: it has left Redis
--        { 'damaged', what is wrong with the round }
--        { 'fenced', reason } or { 'expired', now_ms }
-- Flags  no-writes

local partition, refusal = enter(ARGV[1])
if not partition then
  return refusal
end
local round = read_round(KEYS[2])
if not round or not intact(round, KEYS[3], KEYS[4], KEYS[6]) then
  return { 'damaged', 'round' }
end
if round.intent == 'archived' then
  return { 'ok', whole(partition.now_ms), whole(partition.pseq), 'archived' }
end
local before = math.max(redis.call('ZCOUNT', KEYS[4], '-inf', ARGV[2]) - tonumber(ARGV[4]), 0)
local reply = { 'ok', whole(partition.now_ms), whole(partition.pseq), whole(before) }
local ids = redis.call('ZRANGE', KEYS[4], before, before + tonumber(ARGV[3]) - 1)
if #ids > 0 then
  local records = redis.call('HMGET', KEYS[5], unpack(ids))
  for i, id in ipairs(ids) do
    if not records[i] then
      return { 'damaged', 'orders' }
    end
    reply[#reply + 1] = id
    reply[#reply + 1] = records[i]
  end
end
return reply
