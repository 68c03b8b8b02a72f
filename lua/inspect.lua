-- inspect: what a partition says of itself, for the check that comes before a new epoch.
--
-- KEYS   1 meta, 2 journal
-- Reply  { epoch, incarnation in meta, pseq, last_ms, this server's incarnation, now_ms,
--          its clock in ms, length of the journal, its first id, its last id }
--        '' for what is missing; -1 for the length of a journal that is none
-- Flags  no-writes

local meta = redis.pcall('HMGET', KEYS[1], 'epoch', 'incarnation', 'pseq', 'last_ms')
if meta.err then
  meta = {}
end
local length = redis.pcall('XLEN', KEYS[2])
local first, last = '', ''
if type(length) ~= 'number' then
  length = -1
elseif length > 0 then
  first = redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)[1][1]
  last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1][1]
end
local time = redis.call('TIME')
local clock_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local now_ms = math.max(clock_ms, tonumber(meta[4] or '0') or 0)
return { meta[1] or '', meta[2] or '', meta[3] or '', meta[4] or '',
  string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)'),
  whole(now_ms), whole(clock_ms),
  whole(length), first, last }
