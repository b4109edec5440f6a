"""This file holds the Lua scripts of the trajectory buffer: each is one atomic round trip on Redis 6.2 or later.

All take the same four keys. `stream` holds one entry per live group, `payloads` its encoding. `groups` maps every group
id ever seen to its stream id while it lives and to its end afterwards ("trained" or a drop reason), which makes every
operation idempotent. `counters` holds groups, tokens and bytes by stage; a group is in exactly one stage.

A live group is buffered until the consumer group delivers it, then leased: pending until it is acknowledged. A script's
first write is always one that Redis refuses or allows as a whole when memory is out, so nothing is half done.
"""

from __future__ import annotations

PRELUDE = """
local stream, payloads, groups, counters = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local readers = 'learners'
local consumer = 'run'  -- one name for all time: a lease belongs to the run, not to the process that took it
local GROUP, DRAW, VERSION, TOKENS, BYTES, ENTRY = 2, 4, 6, 8, 10, 12  -- positions of values in a stream entry

local function count(stage, sign, tokens, bytes)
  redis.call('HINCRBY', counters, stage .. ':groups', sign)
  redis.call('HINCRBY', counters, stage .. ':tokens', string.format('%d', sign * tokens))  -- a bare -0 is refused
  redis.call('HINCRBY', counters, stage .. ':bytes', string.format('%d', sign * bytes))
end

local function move(item, from, to)
  local tokens, bytes = tonumber(item[2][TOKENS]), tonumber(item[2][BYTES])
  count(from, -1, tokens, bytes)
  count(to, 1, tokens, bytes)
end

-- A live group's end: acknowledging alone would free nothing.
local function finish(item, from, to)
  redis.call('XACK', stream, readers, item[1])
  redis.call('XDEL', stream, item[1])
  redis.call('HDEL', payloads, item[2][GROUP])
  redis.call('HSET', groups, item[2][GROUP], to)
  move(item, from, to)
end

-- Puts a live group at the stream's end, not delivered to anyone.
local function append_again(item)
  redis.call('XACK', stream, readers, item[1])
  redis.call('XDEL', stream, item[1])
  redis.call('HSET', groups, item[2][GROUP], redis.call('XADD', stream, '*', unpack(item[2])))
end

-- The buffered groups, in order of publication: whatever lies behind the last delivered entry (reply field 8).
local function buffered()
  return redis.call('XRANGE', stream, '(' .. redis.call('XINFO', 'GROUPS', stream)[1][8], '+')
end

-- The stream entry of a leased group, or nil.
local function leased(group_id)
  local at = redis.call('HGET', groups, group_id)
  if not at or not at:match('^%d+%-%d+$') then return nil end
  if #redis.call('XPENDING', stream, readers, at, at, 1) == 0 then return nil end
  return redis.call('XRANGE', stream, at, at)[1]
end
"""

OPEN = """
local answer = redis.pcall('XGROUP', 'CREATE', stream, readers, '0', 'MKSTREAM')
if answer.err and not answer.err:find('BUSYGROUP', 1, true) then return answer end
return 1
"""

# ARGV: group id, draw, oldest version, tokens, entry, payload. Returns 0 if the id is known.
PUT = """
if redis.call('HEXISTS', groups, ARGV[1]) == 1 then return 0 end
local tokens, bytes = tonumber(ARGV[4]), #ARGV[6]
local at = redis.call('XADD', stream, '*', 'group', ARGV[1], 'draw', ARGV[2], 'version', ARGV[3],
  'tokens', ARGV[4], 'bytes', bytes, 'entry', ARGV[5])
redis.call('HSET', payloads, ARGV[1], ARGV[6])
redis.call('HSET', groups, ARGV[1], at)
redis.call('HINCRBY', counters, 'sampled:tokens', tokens)
count('buffered', 1, tokens, bytes)
return 1
"""

# ARGV: group id, tokens, reason. For a group that was never published. Returns 0 if the id is known.
DROP = """
if redis.call('HSETNX', groups, ARGV[1], ARGV[3]) == 0 then return 0 end
redis.call('HINCRBY', counters, 'sampled:tokens', ARGV[2])
count(ARGV[3], 1, tonumber(ARGV[2]), 0)
return 1
"""

# ARGV: wanted, version, max_lag, ordered. Returns entries leased, entries dropped as stale, the stream's newest id.
LEASE = """
local wanted, version, max_lag = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local fresh, stale, entries = {}, {}, {}
for _, item in ipairs(buffered()) do
  if version - tonumber(item[2][VERSION]) > max_lag then
    finish(item, 'buffered', 'stale')
    stale[#stale + 1] = item[2][ENTRY]
  else
    fresh[#fresh + 1] = item
  end
end
if #fresh >= wanted then
  if ARGV[4] == '1' then  -- a consumer group delivers in the stream's order only, so the stream is put in order
    table.sort(fresh, function(a, b) return tonumber(a[2][DRAW]) < tonumber(b[2][DRAW]) end)
    for _, item in ipairs(fresh) do append_again(item) end
  end
  local reply = redis.call('XREADGROUP', 'GROUP', readers, consumer, 'COUNT', wanted, 'STREAMS', stream, '>')
  for position, item in ipairs(reply[1][2]) do
    entries[position] = item[2][ENTRY]
    move(item, 'buffered', 'leased')
  end
end
return {entries, stale, redis.call('XINFO', 'STREAM', stream)[8]}
"""

# ARGV: group ids. Returns the ids that are not leased, and the entries of those that are.
LEASE_AGAIN = """
local missing, entries = {}, {}
for _, group_id in ipairs(ARGV) do
  local item = leased(group_id)
  if item then entries[#entries + 1] = item[2][ENTRY] else missing[#missing + 1] = group_id end
end
return {missing, entries}
"""

# Returns the entries of all leased groups, oldest lease first.
LEASED = """
local entries = {}
local reply = redis.call('XREADGROUP', 'GROUP', readers, consumer, 'STREAMS', stream, '0')
for position, item in ipairs(reply[1][2]) do entries[position] = item[2][ENTRY] end
return entries
"""

# ARGV: group ids. Returns ids that are neither leased nor trained already; commits all or none.
COMMIT = """
local unknown, items = {}, {}
for _, group_id in ipairs(ARGV) do
  if redis.call('HGET', groups, group_id) ~= 'trained' then
    local item = leased(group_id)
    if item then items[#items + 1] = item else unknown[#unknown + 1] = group_id end
  end
end
if #unknown == 0 then
  for _, item in ipairs(items) do finish(item, 'leased', 'trained') end
end
return unknown
"""

# ARGV: group ids. Leased groups become buffered again, at the end of the queue. Returns how many.
GIVE_BACK = """
local given = 0
for _, group_id in ipairs(ARGV) do
  local item = leased(group_id)
  if item then
    append_again(item)
    move(item, 'leased', 'buffered')
    given = given + 1
  end
end
return given
"""

# ARGV: reason. Drops every buffered group and returns their entries.
DROP_BUFFERED = """
local entries = {}
for position, item in ipairs(buffered()) do
  finish(item, 'buffered', ARGV[1])
  entries[position] = item[2][ENTRY]
end
return entries
"""

# ARGV: reason. Counts as dropped what was drawn and has reached no stage since. Returns how many groups.
DROP_IN_FLIGHT = """
local lost, all = 0, redis.call('HGETALL', counters)
for position = 1, #all, 2 do
  local stage = all[position]:match('^(.*):groups$')
  if stage then lost = lost + (stage == 'drawn' and 1 or -1) * tonumber(all[position + 1]) end
end
if lost > 0 then count(ARGV[1], lost, 0, 0) end
return lost
"""

# Returns the counters and the milliseconds since the oldest buffered group was published.
STATS = """
local oldest = redis.call('XRANGE', stream, '(' .. redis.call('XINFO', 'GROUPS', stream)[1][8], '+', 'COUNT', 1)[1]
local age_ms = 0
if oldest then
  local now = redis.call('TIME')
  age_ms = math.floor(now[1] * 1000 + now[2] / 1000) - tonumber(oldest[1]:match('^%d+'))
end
return {redis.call('HGETALL', counters), age_ms}
"""
