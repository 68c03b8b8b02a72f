-- rebuild: begins to load a partition anew. Only recovery calls it, after it has raised the epoch in
-- PostgreSQL. From now on nobody is let in until `install`.
--
-- KEYS   1 meta, 2 journal
-- ARGV   1 the new epoch, 2 epoch in meta as inspected ('' for none), 3 incarnation as inspected,
--        4 pseq of the last entry that survives, 5 'keep' or 'drop': the journal
-- Reply  { 'ok' } or { 'changed' }: the partition is not as inspected, or a later rebuild is at work
-- Flags  none

local meta = redis.pcall('HMGET', KEYS[1], 'epoch', 'rebuilding', 'last_ms')
local incarnation = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
local foreign = meta.err
if foreign then
  meta = {}
end
if (meta[1] or '') ~= ARGV[2] or incarnation ~= ARGV[3]
    or tonumber(meta[2] or '0') > tonumber(ARGV[1]) then
  return { 'changed' }
end
if foreign then
  redis.call('UNLINK', KEYS[1])
end
redis.call('HDEL', KEYS[1], 'epoch')
redis.call('HSET', KEYS[1], 'rebuilding', ARGV[1], 'incarnation', incarnation, 'pseq', ARGV[4],
  'last_ms', meta[3] or '0')
if ARGV[5] == 'drop' then
  redis.call('UNLINK', KEYS[2])
end
return { 'ok' }
