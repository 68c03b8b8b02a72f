-- load: one command of a rebuild. A rebuild that is not the latest one any more writes nothing.
--
-- KEYS   1 meta, 2 the key to write
-- ARGV   1 the epoch that is being rebuilt, 2 a command, then its arguments after the key
-- Reply  { 'ok' } or { 'changed' }: another rebuild is at work, or this one is over
-- Flags  none: refused when memory is full

local meta = redis.pcall('HMGET', KEYS[1], 'rebuilding', 'incarnation')
if meta.err or meta[1] ~= ARGV[1]
    or meta[2] ~= string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)') then
  return { 'changed' }
end
redis.call(ARGV[2], KEYS[2], unpack(ARGV, 3))
return { 'ok' }
