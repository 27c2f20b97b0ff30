// A peer that is told what to do, one JSON object a line on the standard input, and answers likewise:
//
//     {"call": 1, "do": "connect", "path": "/run/app.sock", "mode": "plain"}   {"call": 1, "result": {"connection": 2, ...}}
//     {"call": 2, "do": "ask", "connection": 2, "fields": ["ping", "12345"]}   {"call": 2, "result": ["pong", "12345"]}
//
// `call` is any number of the caller's; calls go on at the same time. What failed comes as "error". Fields, like all
// other bytes, are strings of the characters U+0000 to U+00FF, one for each byte. DO, below, has what can be done.
// Requests of the other side are answered by the handlers below, HANDLERS and CHANNEL_HANDLERS, by the first field.

import { createHash } from 'node:crypto';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { judge } from './judge.mjs';
import { RequestError, connect, listen } from './lib/index.mjs';
import { Rogue } from './rogue.mjs';

const bytes = (text) => Buffer.from(text, 'latin1');
const texts = (fields) => fields && fields.map((field) => Buffer.from(field).toString('latin1'));
const mapOf = (object) => (object ? new Map(Object.entries(object).map(([name, value]) => [name, bytes(value)])) : null);
const objectOf = (map) => map && Object.fromEntries([...map].map(([name, value]) => [name, value.toString('latin1')]));

// ---- handlers ----

/** So many bytes, in which no piece is like another. */
function pattern(size) {
  const all = Buffer.alloc(Math.ceil(size / 4) * 4);
  for (let at = 0; at < size; at += 4) all.writeUInt32BE(at / 4, at);
  return all.subarray(0, size);
}

const digest = (data) => createHash('sha256').update(data).digest('hex');

const held = { now: 0, most: 0 }; // bytes of the requests that are being handled
const ended = []; // how handlers that were interrupted came to their end

/** Wait; note what interrupts it. */
async function pause(ms, signal) {
  try {
    await sleep(ms, undefined, { signal });
  } catch (error) {
    ended.push(signal.reason.constructor.name);
    throw error;
  }
}

const HANDLERS = {
  ping: ({ fields }) => ['pong', ...fields.slice(1)],
  pattern: ({ fields }) => [pattern(Number(fields[1]))],
  digest: ({ fields }) => [digest(fields[1])],
  sleep: async ({ fields, signal }) => { await pause(Number(fields[1]), signal); return ['slept']; },
  stubborn: async ({ fields }) => { await sleep(Number(fields[1])); return ['done all the same']; },
  fail: ({ fields: [, code, message, details] }) => { throw new RequestError(String(code), String(message), details); },
  details: ({ fields }) => { throw new RequestError('details', 'of a size', pattern(Number(fields[1]))); },
  crash: () => { throw new TypeError('this handler is broken'); },
  many: ({ fields }) => Array(Number(fields[1])).fill('x'),
  about: ({ depth, timeout, context }) => [JSON.stringify({ depth, timeout, context: objectOf(context) })],
  back: ({ fields, ask }) => ask(fields.slice(1)),
};

const CHANNEL_HANDLERS = {
  async shout({ channel }) {
    let count = 0;
    for await (const fields of channel) {
      await channel.send(fields.map((field) => field.toString('latin1').toUpperCase()));
      count += 1;
    }
    return [String(count)];
  },
  async pour({ fields: [, count, size], channel }) {
    for (let i = 0; i < Number(count); i += 1) await channel.send([Buffer.alloc(Number(size), i)]);
    await channel.end();
    return ['poured'];
  },
  async swallow({ channel }) {
    let [count, size] = [0, 0];
    for await (const fields of channel) {
      count += 1;
      size += fields.reduce((sum, field) => sum + field.length, 0);
    }
    return [String(count), String(size)];
  },
  hold: async ({ signal }) => { await pause(3600_000, signal); },
};

function handledBy(handlers) {
  return async (request) => {
    const name = String(request.fields[0]);
    if (!Object.hasOwn(handlers, name)) throw new RequestError('unknown-request', `no ${name} here`);
    const size = request.fields.reduce((sum, field) => sum + field.length, 0);
    held.now += size;
    held.most = Math.max(held.most, held.now);
    try {
      return await handlers[name](request);
    } finally {
      held.now -= size;
    }
  };
}

// ---- what can be done ----

const things = []; // listeners, connections and channels, by number
const calls = new Map(); // AbortControllers of the calls that go on

function keep(thing) {
  return things.push(thing) - 1;
}

function settingsOf({ handles = true, key, users, options, refuse, spoil, ...settings }) {
  return {
    ...settings,
    key: key && Buffer.from(key, 'hex'),
    keysOf: (user) => (users?.[user] ?? []).map((one) => Buffer.from(one, 'hex')),
    options: mapOf(options),
    refuse: () => refuse,
    handler: handles ? handledBy(HANDLERS) : null,
    channelHandler: handles ? handledBy(CHANNEL_HANDLERS) : null,
    wrap: spoil && ((wire) => new Rogue(wire, spoil)),
  };
}

function describe(connection, user = null) {
  const { maxMessageSize, maxRequests, options } = connection.theirs;
  return {
    connection: keep(connection), user, limit: connection.limit, maxMessageSize: Number(maxMessageSize), maxRequests,
    options: objectOf(options),
  };
}

const askOptions = ({ timeout, depth, context }, signal) => ({ timeout, depth, context: mapOf(context), signal });

const DO = {
  /** Listen; connections that open wait for `accept`. */
  async listen({ path, host, port, ...settings }) {
    const waiting = [];
    const takers = [];
    const tell = (event) => (takers.length ? takers.shift()(event) : waiting.push(event));
    const server = await listen(
      path ? { path } : { host, port }, settingsOf(settings),
      (connection, user) => tell(describe(connection, user)), (error) => tell({ failed: error.message }),
    );
    const accept = () => (waiting.length ? waiting.shift() : new Promise((resolve) => { takers.push(resolve); }));
    return { listener: keep({ server, accept }), port: server.address().port };
  },
  /** What became of the next client: a connection, or how its handshake failed. */
  accept: ({ listener }) => things[listener].accept(),
  unlisten: ({ listener }) => { things[listener].server.close(); },
  async connect({ path, host, port, ...settings }) {
    return describe(await connect(path ? { path } : { host, port }, settingsOf(settings)));
  },
  /** Ask; `extra` adds a field of so many bytes, and `digested` gives the digests of the answer's fields alone. */
  async ask({ connection, fields, extra, digested, ...options }, signal) {
    const all = [...fields.map(bytes), ...(extra === undefined ? [] : [pattern(extra)])];
    const answer = await things[connection].ask(all, askOptions(options, signal));
    return digested ? answer.map(digest) : texts(answer);
  },
  async open({ connection, fields, ...options }, signal) {
    return { channel: keep(await things[connection].openChannel(fields.map(bytes), askOptions(options, signal))) };
  },
  send: async ({ channel, fields }) => { await things[channel].channel.send(fields.map(bytes)); },
  end: async ({ channel }) => { await things[channel].channel.end(); },
  receive: async ({ channel }) => texts(await things[channel].channel.receive()),
  answer: async ({ channel }) => texts(await things[channel].answer),
  leave: ({ channel }) => { things[channel].cancel(); },
  ping: async ({ connection }) => { await things[connection].ping(); },
  drain: async ({ connection }) => things[connection].drain(),
  close: async ({ connection }) => things[connection].close(),
  /** Close the transport, and say nothing. */
  cut: ({ connection }) => { things[connection].wire.close(); },
  finished: async ({ connection }) => things[connection].finished,
  counts: ({ connection }) => things[connection].counts,
  /** How handlers were interrupted since the last time, and how many bytes of requests there were at once. */
  ended: () => ended.splice(0),
  most: () => { const { most } = held; held.most = held.now; return most; },
  /** Write bytes that need not be packets; `raw`: nor records. */
  write: ({ connection, data }) => { things[connection].wire.write(bytes(data)); },
  raw: ({ connection, data }) => { things[connection].wire.writeRaw(bytes(data)); },
  /** What the server of judge.mjs makes of packets. */
  judge: ({ packets, ...rest }) => judge({ ...rest, packets: packets.map((packet) => Buffer.from(packet, 'hex')) }),
  /** Let another call fail, as cancelled. */
  cancel: ({ other }) => { calls.get(other)?.abort(); },
};

async function obey({ call, do: name, ...rest }) {
  const controller = new AbortController();
  calls.set(call, controller);
  try {
    if (!Object.hasOwn(DO, name)) throw new RangeError(`cannot do ${name}`);
    return { call, result: (await DO[name](rest, controller.signal)) ?? null };
  } catch (error) {
    const { message, code = null, details = '', mayHaveRun = null } = error;
    return { call, error: { name: error.constructor.name, message, code, details: details.toString('latin1'), mayHaveRun } };
  } finally {
    calls.delete(call);
  }
}

createInterface({ input: process.stdin }).on('line', async (line) => {
  process.stdout.write(`${JSON.stringify(await obey(JSON.parse(line)))}\n`);
}).on('close', async () => {
  for (let i = 0; calls.size && i < 20; i += 1) await sleep(50); // let what goes on end, for a second
  process.exit();
});
