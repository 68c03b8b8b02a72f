-- condemn: the audit has proved that Redis lacks something of a round: nothing of it is sold, on any
-- node, until recovery has written it anew.
--
-- KEYS   1 meta, 2 round
-- ARGV   1 caller (shared/partition.lua), 2 what is missing
-- Reply  { 'ok', now_ms, pseq }; a round that is not there is damaged anyway
--        { 'fenced', reason } or { 'expired', now_ms }: nothing written
-- Flags  allow-oom: selling can be stopped whatever happens

local partition, refusal = enter(ARGV[1])
if not partition then
  return refusal
end
if read_round(KEYS[2]) then
  redis.call('HSET', KEYS[2], 'condemned', ARGV[2])
end
return { 'ok', whole(partition.now_ms), whole(partition.pseq) }
