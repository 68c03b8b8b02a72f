-- inspect: what a partition says of itself, for the check that comes before a new epoch.
--
-- KEYS   1 meta, 2 journal
-- Reply  { epoch, incarnation in meta, pseq, last_ms, this server's incarnation, now_ms,
--          its clock in ms, length of the journal, its first id, its last id,
--          1 if this server has been a replica, else 0,
--          what scripts write with and this user may not, in words }
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
local info = redis.call('INFO', 'replication')
-- Redis does not roll back: a script that is stopped half-way would leave a decision in the journal
-- that the round does not have.
local denied = {}
for _, command in ipairs({
  { 'XADD', KEYS[2], '*', 'f', '' }, { 'HSET', KEYS[1], 'f', '' }, { 'HDEL', KEYS[1], 'f' },
  { 'ZADD', KEYS[1], 0, 'f' }, { 'ZREM', KEYS[1], 'f' }, { 'UNLINK', KEYS[1] },
}) do
  if not redis.acl_check_cmd(unpack(command)) then
    denied[#denied + 1] = command[1]
  end
end
return { meta[1] or '', meta[2] or '', meta[3] or '', meta[4] or '',
  string.match(info, 'master_replid:(%x+)'),
  whole(now_ms), whole(clock_ms),
  whole(length), first, last,
  string.find(info, 'second_repl_offset:-1', 1, true) and '0' or '1', table.concat(denied, ' ') }
