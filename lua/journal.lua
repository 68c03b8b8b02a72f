-- journal: reads entries for the writer, from the server and timeline that it means.
--
-- KEYS   1 meta, 2 journal
-- ARGV   1 epoch, 2 pseq of the last entry it has, 3 entries at most, 4 id of that entry
-- Reply  { 'ok', pseq, entries } as XRANGE gives them
--        { 'fenced', reason }: nothing of this may be stored
-- Flags  no-writes

local meta = redis.pcall('HMGET', KEYS[1], 'epoch', 'incarnation', 'pseq')
if meta.err or not (meta[1] and meta[2] and meta[3]) then
  return { 'fenced', 'meta' }
elseif meta[1] ~= ARGV[1] then
  return { 'fenced', 'epoch' }
elseif meta[2] ~= string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)') then
  return { 'fenced', 'incarnation' }
elseif tonumber(meta[3]) < tonumber(ARGV[2]) then
  return { 'fenced', 'behind' }
end
local entries = redis.pcall('XRANGE', KEYS[2], '(' .. ARGV[4], '+', 'COUNT', ARGV[3])
if entries.err then
  return { 'fenced', 'journal' }
end
return { 'ok', meta[3], entries }
