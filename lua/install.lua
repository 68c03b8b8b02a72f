-- install: begins an epoch. Only recovery calls it, after it has raised the epoch in PostgreSQL
-- and checked everything else.
--
-- KEYS   1 meta, 2 journal
-- ARGV   1 the new epoch, 2 epoch in meta as inspected ('' for a partition that never was),
--        3 pseq as inspected, 4 incarnation as inspected
--        A rebuild is under way: only its own epoch may be installed.
-- Reply  { 'ok', pseq }: meta carries the new epoch, and the journal says so
--        { 'changed' }: the partition is not as inspected; nothing written
-- Flags  none

local meta = redis.pcall('HMGET', KEYS[1], 'epoch', 'pseq', 'last_ms', 'rebuilding')
if meta.err then
  return { 'changed' }
end
local incarnation = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
if (meta[1] or '') ~= ARGV[2] or (meta[2] or '0') ~= ARGV[3] or incarnation ~= ARGV[4]
    or (meta[4] and meta[4] ~= ARGV[1]) then
  return { 'changed' }
end
local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
now_ms = math.max(now_ms, tonumber(meta[3] or '0'))
local pseq = tonumber(ARGV[3]) + 1
local added = redis.pcall('XADD', KEYS[2], whole(tonumber(ARGV[1])) .. '-' .. whole(pseq),
  'v', VERSION_LIFE, 't', whole(now_ms), 'r', '', 'o', '', 'e', pack_event(255, 0, 'epoch', nil, 0))
if type(added) == 'table' then
  return { 'changed' }
end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'incarnation', incarnation, 'pseq', whole(pseq),
  'last_ms', whole(now_ms))
redis.call('HDEL', KEYS[1], 'rebuilding')
return { 'ok', whole(pseq) }
