"""This file holds the Lua scripts of the trajectory buffer: each is one atomic round trip on Redis 6.2 or later.

All take the same keys, which share one hash slot of a cluster:

    counters   HASH   groups, tokens and bytes by stage; drawn, floor, step, arrivals; schema and owner
    drawn      HASH   group id -> Draw, of those admitted and neither published nor dropped
    waiting    ZSET   group ids by order of arrival         versions   ZSET   the same ids by oldest policy version
    leased     ZSET   group ids by step and position in its batch
    entries    HASH   group id -> facts and GroupEntry, of every live group: waiting or leased
    payloads   HASH   group id -> Group, the same
    ended      SET    numbers of the ended draws that are not below the floor
    answer     LIST   what the last answer said that a repetition could not find out again
    state      STRING the driver's sampling state

Every operation may be repeated. A draw has ended if its number is below the floor, the lowest draw that has not, or
stands in `ended`: so memory does not grow with the length of a run. In a script that takes memory the first write is
one that Redis refuses or allows as a whole; one that frees memory begins with a write that is always allowed.
"""

from __future__ import annotations

SCHEMA = 2
KEYS = {
    "counters": "hash",
    "drawn": "hash",
    "waiting": "zset",
    "versions": "zset",
    "leased": "zset",
    "entries": "hash",
    "payloads": "hash",
    "ended": "set",
    "answer": "list",
    "state": "string",
}
PER_STEP = 1 << 16  # positions in a batch; a score of `leased` is step * PER_STEP + position, exact below 2^53

HEADER = f"""
local {", ".join(KEYS)} = unpack(KEYS)
local PER_STEP, SLICE = {PER_STEP}, 1000  -- Lua passes no more than some thousands of arguments
local call = redis.call
"""

FUNCTIONS = """
local before, floor, next_draw, last_step, arrivals
local tally, done = {}, {}  -- what `settle` writes in the end: changes of counters, and draws that ended

local function begin()
  before = call('HMGET', counters, 'floor', 'drawn', 'step', 'arrivals')
  for mark = 1, 4 do before[mark] = tonumber(before[mark] or 0) end
  floor, next_draw, last_step, arrivals = unpack(before)
end

local function in_slices(command, key, things)
  for first = 1, #things, SLICE do
    call(command, key, unpack(things, first, math.min(first + SLICE - 1, #things)))
  end
end

local function add(name, amount) tally[name] = (tally[name] or 0) + amount end

local function count(stage, groups, tokens, bytes)
  add(stage .. ':groups', groups)
  add(stage .. ':tokens', tokens)
  add(stage .. ':bytes', bytes)
end

local function has_ended(draw) return draw < floor or call('SISMEMBER', ended, draw) == 1 end

local function hear_of(draw) next_draw = math.max(next_draw, draw + 1) end

local function finish(draw) if draw >= floor then done[draw] = true end end

-- The floor moves up over what has ended, and everything that changed is written.
local function settle()
  local moved, above, names, values = false, {}, {}, {}
  while done[floor] or (moved and call('SREM', ended, floor) == 1) do
    done[floor] = nil
    floor, moved = floor + 1, true
  end
  for draw in pairs(done) do above[#above + 1] = draw end
  in_slices('SADD', ended, above)
  for name, amount in pairs(tally) do if amount ~= 0 then names[#names + 1] = name end end
  local held = #names > 0 and call('HMGET', counters, unpack(names))
  local function set(name, value) values[#values + 1], values[#values + 2] = name, value end
  for position, name in ipairs(names) do set(name, (held[position] or 0) + tally[name]) end
  for mark, value in ipairs({floor, next_draw, last_step, arrivals}) do
    if value ~= before[mark] then set(({'floor', 'drawn', 'step', 'arrivals'})[mark], value) end
  end
  if #values > 0 then call('HSET', counters, unpack(values)) end
end

local function read(kept)
  local draw, version, tokens, bytes, arrived = struct.unpack('>ddddd', kept)
  return {draw = draw, version = version, tokens = tokens, bytes = bytes, arrived = arrived, entry = kept:sub(41)}
end

-- A live group: draw, version, tokens, bytes, arrival in ms and entry; nothing if it is not live.
local function live(id)
  local kept = call('HGET', entries, id)
  return kept and read(kept) or nil
end

-- What a command answers for each of these.
local function gather(command, key, ids)
  local found = {}
  for first = 1, #ids, SLICE do
    local answers = call(command, key, unpack(ids, first, math.min(first + SLICE - 1, #ids)))
    for position = 1, #answers do found[first + position - 1] = answers[position] end
  end
  return found
end

-- All of these, which are live, in order.
local function all_live(ids)
  local groups = gather('HMGET', entries, ids)
  for position, kept in ipairs(groups) do groups[position] = read(kept) end
  return groups
end

local function entries_of(ids)
  local found = {}
  for position, group in ipairs(all_live(ids)) do found[position] = group.entry end
  return found
end

-- Live groups, each named once, end, and their memory is free.
local function release(ids, groups, stage)
  local scores, sums = gather('ZMSCORE', leased, ids), {leased = {0, 0, 0}, buffered = {0, 0, 0}}
  for position, group in ipairs(groups) do
    local sum = scores[position] and sums.leased or sums.buffered
    sum[1], sum[2], sum[3] = sum[1] + 1, sum[2] + group.tokens, sum[3] + group.bytes
    finish(group.draw)
  end
  for from, sum in pairs(sums) do
    count(from, -sum[1], -sum[2], -sum[3])
    count(stage, sum[1], sum[2], 0)
  end
  for _, key in ipairs({leased, waiting, versions}) do in_slices('ZREM', key, ids) end
  for _, key in ipairs({entries, payloads}) do in_slices('HDEL', key, ids) end
end

local function leased_for(step)
  return call('ZRANGEBYSCORE', leased, step * PER_STEP, (step + 1) * PER_STEP - 1)
end

-- A live group becomes leased, or leased for another step.
local function set_lease(id, group, step, position)
  if call('ZREM', waiting, id) == 1 then
    call('ZREM', versions, id)
    count('buffered', -1, -group.tokens, -group.bytes)
    count('leased', 1, group.tokens, group.bytes)
  end
  call('ZADD', leased, step * PER_STEP + position, id)
end

-- What left its place under this request before, the answer having been lost; what older requests left is forgotten.
local function told_before(request)
  local told = call('LRANGE', answer, 0, -1)
  if #told > 0 and told[1] ~= request then call('DEL', answer) end
  if told[1] ~= request then return {} end
  table.remove(told, 1)
  return told
end

local function tell(request, told, facts)
  if #told == 0 and #facts > 0 then call('RPUSH', answer, request) end
  in_slices('RPUSH', answer, facts)
  for _, fact in ipairs(facts) do told[#told + 1] = fact end
  return told
end

-- Live groups are dropped; returns their entries, now and if the request is repeated.
local function drop(request, ids, reason)
  local told, groups, dropped = told_before(request), all_live(ids), {}
  release(ids, groups, reason)
  for position, group in ipairs(groups) do dropped[position] = group.entry end
  return tell(request, told, dropped)
end
"""

# ARGV: schema, owner or '', then the type of each key. Returns nothing, or what is wrong: kind, key, what was found.
OPEN = """
local exists = false
for position, key in ipairs(KEYS) do
  local kind = call('TYPE', key).ok
  exists = exists or kind ~= 'none'
  if kind ~= 'none' and kind ~= ARGV[position + 2] then return {'type', key, kind} end
end
local schema = call('HGET', counters, 'schema')
if exists and schema ~= ARGV[1] then return {'schema', counters, schema or 'none'} end
if not schema then call('HSET', counters, 'schema', ARGV[1]) end
if ARGV[2] == '' then return {} end
local owner = call('HGET', counters, 'owner')
if not owner then call('HSET', counters, 'owner', ARGV[2]) end
if owner and owner ~= ARGV[2] then return {'owner', counters, ''} end
return {}
"""

# ARGV: group id, draw, encoded draw, and the state to keep with it, if any.
ADMIT = """
begin()
local draw = tonumber(ARGV[2])
if call('HEXISTS', entries, ARGV[1]) == 0 and not has_ended(draw) then
  call('HSET', drawn, ARGV[1], ARGV[3])
  hear_of(draw)
end
if ARGV[4] then call('SET', state, ARGV[4]) end
settle()
"""

# ARGV: group id, draw, oldest version, tokens, entry, payload. Returns 0 if the group is live or has ended.
# The one script that runs for every group by itself: it spares the functions, and writes all counters at once.
PUT = """
local id, draw, tokens, bytes = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[4]), #ARGV[6]
local held = call('HMGET', counters, 'floor', 'drawn', 'arrivals', 'sampled:tokens', 'buffered:groups',
  'buffered:tokens', 'buffered:bytes')
for position = 1, #held do held[position] = tonumber(held[position] or 0) end
if draw < held[1] or call('SISMEMBER', ended, draw) == 1 then return 0 end
local now = call('TIME')
local facts = struct.pack('>ddddd', draw, ARGV[3], tokens, bytes, now[1] * 1000 + math.floor(now[2] / 1000))
if call('HSETNX', entries, id, facts .. ARGV[5]) == 0 then return 0 end
call('HSET', payloads, id, ARGV[6])
call('HDEL', drawn, id)
call('ZADD', waiting, held[3] + 1, id)
call('ZADD', versions, ARGV[3], id)
call('HSET', counters, 'drawn', math.max(held[2], draw + 1), 'arrivals', held[3] + 1,
  'sampled:tokens', held[4] + tokens, 'buffered:groups', held[5] + 1,
  'buffered:tokens', held[6] + tokens, 'buffered:bytes', held[7] + bytes)
return 1
"""

# ARGV: group id, draw, tokens, reason. Returns 0 if the group is live, and then it stays.
DROP = """
begin()
local draw, tokens = tonumber(ARGV[2]), tonumber(ARGV[3])
call('HDEL', drawn, ARGV[1])
if call('HEXISTS', entries, ARGV[1]) == 1 then return 0 end
if has_ended(draw) then return 1 end
hear_of(draw)
add('sampled:tokens', tokens)
count(ARGV[4], 1, tokens, 0)
finish(draw)
settle()
return 1
"""

# ARGV: request, step, wanted, version, max_lag, ordered. Returns the last leased step, entries leased, entries dropped.
LEASE = """
begin()
local step, wanted, last = tonumber(ARGV[2]), tonumber(ARGV[3]), last_step
if step > last + 1 then return {last, {}, {}} end
local ids = leased_for(step)
if #ids > 0 then return {last, entries_of(ids), told_before(ARGV[1])} end
local dropped = drop(ARGV[1], call('ZRANGEBYSCORE', versions, '-inf', '(' .. (ARGV[4] - ARGV[5])), 'stale')
local found, scores, tokens, bytes = {}, {}, 0, 0
if call('ZCARD', waiting) >= wanted then
  ids = call('ZRANGE', waiting, 0, ARGV[6] == '1' and -1 or wanted - 1)
  local groups = all_live(ids)
  for position, id in ipairs(ids) do groups[position].id = id end
  if ARGV[6] == '1' then table.sort(groups, function(a, b) return a.draw < b.draw end) end
  for position = 1, wanted do
    local group = groups[position]
    ids[position], found[position] = group.id, group.entry
    scores[2 * position - 1], scores[2 * position] = step * PER_STEP + position, group.id
    tokens, bytes = tokens + group.tokens, bytes + group.bytes
  end
  count('buffered', -wanted, -tokens, -bytes)
  count('leased', wanted, tokens, bytes)
  for position = #ids, wanted + 1, -1 do ids[position] = nil end
  in_slices('ZREM', waiting, ids)
  in_slices('ZREM', versions, ids)
  in_slices('ZADD', leased, scores)
  last_step = math.max(last_step, step)
end
settle()
return {last, found, dropped}
"""

# ARGV: step, then group ids. Returns the ids that are not live, and the entries of the others; leases all or none.
LEASE_EXACTLY = """
begin()
local step, missing, found, groups = tonumber(ARGV[1]), {}, {}, {}
for position = 2, #ARGV do
  groups[position] = live(ARGV[position])
  if not groups[position] then missing[#missing + 1] = ARGV[position] end
end
if #missing > 0 then return {missing, {}} end
for position = 2, #ARGV do
  set_lease(ARGV[position], groups[position], step, position - 1)
  found[position - 1] = groups[position].entry
end
last_step = math.max(last_step, step)
settle()
return {missing, found}
"""

# ARGV: step, group id, draw, oldest version, tokens, entry, payload. The group ends up leased for the step, last in it.
RESTORE = """
begin()
local step, id, draw, tokens = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[5])
local batch, group = leased_for(step), live(id)
if not group then
  call('HSET', payloads, id, ARGV[7])
  local facts = struct.pack('>ddddd', draw, ARGV[4], tokens, #ARGV[7], call('TIME')[1] * 1000)
  call('HSET', entries, id, facts .. ARGV[6])
  call('HDEL', drawn, id)
  hear_of(draw)
  if has_ended(draw) then count('trained', -1, -tokens, 0) else add('sampled:tokens', tokens) end
  count('leased', 1, tokens, #ARGV[7])
  group = live(id)
end
local position, there = 0, false
for _, other in ipairs(batch) do
  position = call('ZSCORE', leased, other) % PER_STEP
  there = there or other == id
end
if not there then set_lease(id, group, step, position + 1) end
last_step = math.max(last_step, step)
settle()
"""

# ARGV: step, or 0 if it is not known, and a msgpack list of group id, draw and tokens of every group, none twice.
COMMIT = """
begin()
local facts, ids, live_ids, groups = cmsgpack.unpack(ARGV[2]), {}, {}, {}
for position, fact in ipairs(facts) do ids[position] = fact[1] end
for position, kept in ipairs(gather('HMGET', entries, ids)) do
  local id, draw, tokens = unpack(facts[position])
  if kept then
    live_ids[#live_ids + 1], groups[#groups + 1] = id, read(kept)
  elseif not has_ended(draw) then  -- Redis lost it with its last second, after it was trained
    call('HDEL', drawn, id)
    hear_of(draw)
    add('sampled:tokens', tokens)
    count('trained', 1, tokens, 0)
    finish(draw)
  end
end
release(live_ids, groups, 'trained')
last_step = math.max(last_step, tonumber(ARGV[1]))
settle()
"""

# ARGV: request, step. Its leased groups wait again, as the last to have arrived. Returns their ids.
RELEASE = """
begin()
local ids, told = leased_for(tonumber(ARGV[2])), told_before(ARGV[1])
for _, id in ipairs(ids) do
  local group = live(id)
  call('ZREM', leased, id)
  arrivals = arrivals + 1
  call('ZADD', waiting, arrivals, id)
  call('ZADD', versions, group.version, id)
  count('leased', -1, -group.tokens, -group.bytes)
  count('buffered', 1, group.tokens, group.bytes)
end
settle()
return tell(ARGV[1], told, ids)
"""

# ARGV: draws that nobody has. Counts them as aborted.
WRITE_OFF = """
begin()
for _, number in ipairs(ARGV) do
  local draw = tonumber(number)
  if not has_ended(draw) then
    hear_of(draw)
    count('aborted', 1, 0, 0)
    finish(draw)
  end
end
settle()
"""

# ARGV: request, reason. Drops every waiting group and returns their entries.
DROP_WAITING = """
begin()
local dropped = drop(ARGV[1], call('ZRANGE', waiting, 0, -1), ARGV[2])
settle()
return dropped
"""

# Returns the entries of the waiting groups by arrival, and id and score of the leased ones by step and position.
HOLDINGS = """
return {entries_of(call('ZRANGE', waiting, 0, -1)), call('ZRANGE', leased, 0, -1, 'WITHSCORES')}
"""

# Returns the counters, and the milliseconds since the first of the waiting groups was published.
STATS = """
local first, age_ms = call('ZRANGE', waiting, 0, 0)[1], 0
if first then
  local now = call('TIME')
  age_ms = math.max(0, now[1] * 1000 + math.floor(now[2] / 1000) - live(first).arrived)
end
return {call('HGETALL', counters), age_ms}
"""
