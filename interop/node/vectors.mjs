// Check tests/vectors.json: `node vectors.mjs FILE` prints how many of each kind hold, or fails with the first that does not.

import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { B } from './lib/crypto.mjs';
import { Connection } from './lib/connection.mjs';
import { ClientHandshake, NotAuthenticated, Refused, ServerHandshake } from './lib/handshake.mjs';
import { packetInRecord } from './lib/opening.mjs';
import {
  ProtocolError, decodeBody, decodeNumber, decodeOptions, encodeOptions, encodePacket, encodeUser, userIn,
} from './lib/packets.mjs';
import { MAX_BOX, Opener, Sealer, boxLength } from './lib/records.mjs';
import { InFlight, Session } from './lib/session.mjs';

const vectors = JSON.parse(readFileSync(process.argv[2], 'utf8'));
const counts = {};
const hex = (text) => Buffer.from(text, 'hex');
const hexes = (texts) => texts.map(hex);

/** Check each of `list`, and count it. */
function each(kind, list, check) {
  assert.ok(list.length, kind);
  for (const [i, vector] of list.entries()) {
    try {
      check(vector);
    } catch (error) {
      throw new Error(`${kind} ${i}, ${vector.name ?? ''}`, { cause: error });
    }
  }
  counts[kind] = list.length;
}

const refuses = (run) => assert.throws(run, ProtocolError);

each('packets.good', vectors.packets.good, ({ fields, packet }) => {
  assert.equal(encodePacket(hexes(fields)).toString('hex'), packet);
  assert.deepEqual(decodeBody(hex(packet).subarray(4)), hexes(fields));
});
each('packets.bad', vectors.packets.bad, ({ limit, packet }) => {
  refuses(() => new Session({ client: false, limit, maxRequests: 1 }).receive(hex(packet), []));
});
each('numbers.good', vectors.numbers.good, ({ number, field }) => {
  const decoded = decodeNumber(hex(field), 'number');
  assert.equal(Number(decoded), number); // JSON.parse has rounded the longest
  assert.equal(String(decoded), hex(field).toString());
});
each('numbers.bad', vectors.numbers.bad, (field) => refuses(() => decodeNumber(hex(field), 'number')));
each('users.good', vectors.users.good, ({ user, field }) => {
  assert.equal(encodeUser(user).toString('hex'), field);
  assert.equal(userIn(hex(field)), user);
});
each('users.bad', vectors.users.bad, ({ field }) => assert.equal(userIn(hex(field)), null));
each('options.good', vectors.options.good, ({ options, body }) => {
  const map = optionsOf(options);
  assert.equal(encodeOptions(map).toString('hex'), body);
  assert.deepEqual(decodeOptions(hex(body)), map);
});
each('options.bad', vectors.options.bad, ({ body }) => refuses(() => decodeOptions(hex(body))));

function optionsOf(options) {
  return new Map(Object.entries(options).map(([name, value]) => [name, hex(value)]));
}

/** Both sides of the handshake in this mode, with what is random in it fixed. */
function sides(mode) {
  const v = vectors[mode];
  const settings = ([maxMessageSize, maxRequests], options) => ({
    mode, maxMessageSize, maxRequests, options: optionsOf(options), service: v.service ?? '', user: v.user,
    key: v.key && hex(v.key),
  });
  const fixed = (secret, sessionKey) => ({ secret: secret && hex(secret), sessionKey: sessionKey && hex(sessionKey) });
  return {
    v,
    client: new ClientHandshake(settings(v.client_limits, v.client_options), fixed(v.client_secret, v.session_key)),
    server: new ServerHandshake(settings(v.server_limits, v.server_options), fixed(v.server_secret)),
  };
}

const body = (packet) => hex(packet).subarray(4);

each('handshakes', ['sealed', 'plain'], (mode) => {
  const { v, client, server } = sides(mode);
  const same = (value, name) => assert.equal(value.toString('hex'), v[name], name);
  const sent = { client: [client.ownHello], server: [server.ownHello] };
  same(client.ownHello, 'C');
  same(server.ownHello, 'S');
  server.receiveHello(client.ownHello);
  client.receiveHello(server.ownHello);
  const open = client.open();
  same(open, 'open');
  assert.equal(server.receiveOpen(open.subarray(4)), mode === 'sealed' ? v.user : '');
  if (mode === 'sealed') assert.ok(server.openBox([Buffer.alloc(32), hex(v.key)]));
  const accepted = server.accepted();
  same(accepted, 'accepted');
  const theirs = client.receiveAnswer(accepted.subarray(4));
  assert.deepEqual([Number(theirs.maxMessageSize), theirs.maxRequests], v.server_limits);
  assert.deepEqual(theirs.options, optionsOf(v.server_options));
  if (mode === 'sealed') {
    for (const side of [client, server]) for (const name of ['ee', 'h0', 'hs', 'h1', 'h2', 'fk', 'box']) same(side[name], name);
    same(client.sessionKey, 'session_key');
    sent.client.push(new Sealer(client.directions(client.hs).send).seal(open));
    sent.server.push(new Sealer(server.directions(server.hs).send).seal(accepted));
  } else {
    sent.client.push(open);
    sent.server.push(accepted);
  }
  same(Buffer.concat(sent.client), 'client_sends');
  same(Buffer.concat(sent.server), 'server_sends');
});
each('refused', vectors.refused, ({ packet, record }) => {
  const { client, server } = sides('sealed');
  server.receiveHello(client.ownHello);
  client.receiveHello(server.ownHello);
  client.open();
  const [, code, message] = decodeBody(body(packet)).map(String);
  assert.equal(server.refused(code, message).toString('hex'), packet);
  assert.equal(new Sealer(server.directions(server.hs).send).seal(hex(packet)).toString('hex'), record);
  assert.throws(() => client.receiveAnswer(body(packet)), (error) => error instanceof Refused && error.code === code);
});
each('bad_hellos', vectors.bad_hellos, ({ to, mode, hello }) => {
  refuses(() => sides(mode)[to].receiveHello(hex(hello)));
});
each('bad_opens', vectors.bad_opens, ({ mode, refused, open }) => {
  const { v, client, server } = sides(mode);
  server.receiveHello(client.ownHello);
  const receive = () => server.receiveOpen(packetInRecord(hex(open)));
  if (refused === null) refuses(receive);
  else {
    const user = receive();
    assert.equal(server.openBox(user === v.user ? [hex(v.key)] : []), false);
    assert.equal(refused, 'authentication');
  }
});
each('bad_replies', vectors.bad_replies, ({ mode, authentication, reply }) => {
  const { client, server } = sides(mode);
  client.receiveHello(server.ownHello);
  client.open();
  assert.throws(
    () => client.receiveAnswer(packetInRecord(hex(reply))),
    (error) => {
      const isRefused = error instanceof Refused;
      assert.ok(isRefused || error instanceof ProtocolError);
      return (isRefused ? error.code === 'authentication' : error instanceof NotAuthenticated) === authentication;
    },
  );
});

each('records.stream', [vectors.records], ({ stream, records }) => {
  const sent = stream.flatMap(({ key, plaintexts }) => {
    const sealer = new Sealer(hex(key));
    return hexes(plaintexts).map((plaintext) => sealer.seal(plaintext).toString('hex'));
  });
  assert.deepEqual(sent, records);
  let at = 0;
  for (const { key, plaintexts } of stream) {
    const opener = new Opener(hex(key));
    const got = [...opener.feed(Buffer.concat(hexes(records.slice(at, at + plaintexts.length))))];
    assert.deepEqual(got, hexes(plaintexts.filter((plaintext) => plaintext)));
    assert.equal(opener.ended, plaintexts.includes(''));
    at += plaintexts.length;
  }
});
each('records.bad', vectors.records.bad, ({ key, record }) => {
  refuses(() => {
    const bytes = hex(record);
    boxLength(bytes, MAX_BOX);
    assert.deepEqual([...new Opener(hex(key)).feed(bytes)], []);
  });
});

// The open connection. What the packets mean is checked on a Session, what is sent on a Connection that leads nowhere.

const { max_message_size: limit, max_requests: maxRequests, credit } = vectors.connection;

/** The requests of the server that have left before the packets come: for each, whether it has a channel. */
const SENT = { connectionGood: [false, false, true], connectionBad: [], sequences: [true, false] };
const CREDIT = 262_144;

/** The session of a server that has sent these requests, and perhaps `bye`. */
function sessionOf(sent, bye) {
  const session = new Session({ client: false, limit, maxRequests });
  for (const [i, channel] of sent.entries()) {
    const request = new InFlight(BigInt(2 * i + 1), 0, channel ? 0 : null, channel ? CREDIT : null);
    request.left = true;
    session.ours.set(request.id, request);
  }
  session.byeLeft = bye;
  return session;
}

/** Receive packets one after the other, each alone, granting credit in between. Returns all events. */
function receiveAll(session, packets) {
  const all = [];
  for (const packet of packets) {
    const events = [];
    session.receive(hex(packet), events);
    for (const { kind, request } of events) {
      if (kind === 'chan' && !(session.byeLeft && request.depth === 0)) request.receiveCredit += credit;
    }
    all.push(...events);
  }
  return all;
}

/** What is under a Connection that leads nowhere. */
class Nowhere {
  sent = [];
  writable = true;
  ended = false;

  start(receive) { this.receive = (bytes) => receive(bytes, null); }
  write(bytes) { this.sent.push(bytes); }
  writeEnd() { this.ended = true; }
  linger() { return new Promise(() => {}); }
  close() { this.ended = true; }
}

/** What the same server sends when it receives the packets: the fields of each packet, and whether it ended. */
function repliesTo(packets, sent, bye) {
  const wire = new Nowhere();
  const never = () => new Promise(() => {});
  const connection = new Connection(wire, {
    client: false,
    theirs: { maxMessageSize: BigInt(limit), maxRequests: 100, options: new Map(), room: null },
    settings: { maxMessageSize: limit, maxRequests, window: credit, handler: never, channelHandler: never },
  });
  connection.start();
  for (const channel of sent) (channel ? connection.openChannel([], { window: CREDIT }) : connection.ask([])).catch(() => {});
  if (bye) connection.drain();
  connection.pump();
  wire.sent = [];
  wire.writable = false; // nothing leaves before all packets came
  for (const packet of packets) wire.receive(hex(packet));
  wire.writable = true;
  connection.pump();
  const { ended } = wire;
  connection.close();
  const bytes = Buffer.concat(wire.sent);
  const replies = [];
  for (let at = 0; at < bytes.length; at += 4 + bytes.readUInt32BE(at)) {
    replies.push(decodeBody(bytes.subarray(at + 4, at + 4 + bytes.readUInt32BE(at))));
  }
  return { replies, ended };
}

const kindOf = (fields) => fields[0].toString();
const isClosing = (fields) => kindOf(fields) === 'err' && fields[2].toString() === 'closing';

function checkRefused(packets, sent, bye) {
  const session = sessionOf(sent, bye);
  receiveAll(session, packets.slice(0, -1));
  assert.throws(() => receiveAll(session, packets.slice(-1)), ProtocolError);
  const { replies, ended } = repliesTo(packets, sent, bye);
  assert.ok(ended);
  const aborts = replies.flatMap((fields, i) => (kindOf(fields) === 'abort' ? [i] : []));
  assert.deepEqual(aborts, session.aborted ? [] : [replies.length - 1]); // no abort answers an abort
}

each('connection.good', vectors.connection.good, ({ fields, packet }) => {
  assert.equal(encodePacket(hexes(fields)).toString('hex'), packet);
  const kind = hex(fields[0]).toString();
  const before = kind === 'drop' ? [vectors.connection.good.find(({ name }) => name === 'part').packet] : [];
  const { replies, ended } = repliesTo([...before, packet], SENT.connectionGood, kind === 'bye-ok');
  assert.equal(ended, kind === 'abort');
  assert.ok(replies.every((reply) => kindOf(reply) !== 'abort'));
});
each('connection.bad', vectors.connection.bad, ({ packet }) => checkRefused([packet], SENT.connectionBad, false));
each('sequences.good', vectors.sequences.good, ({ bye, packets, requests, items, replies }) => {
  const events = receiveAll(sessionOf(SENT.sequences, bye), packets);
  const seen = (...kinds) => events.filter(({ kind }) => kinds.includes(kind))
    .map(({ request, body: fields }) => ({ id: Number(request.id), fields: fields.map((field) => field.toString('hex')) }));
  assert.deepEqual(seen('req', 'chan'), requests);
  assert.deepEqual(seen('item'), items);
  const sent = repliesTo(packets, SENT.sequences, bye).replies.filter((fields) => !isClosing(fields));
  assert.equal(Buffer.concat(sent.map(encodePacket)).toString('hex'), replies);
});
each('sequences.bad', vectors.sequences.bad, ({ bye, packets }) => checkRefused(packets, SENT.sequences, bye));
each('passphrases', vectors.passphrases, ({ user, salt }) => {
  assert.equal(B(16, null, 'bokbok1 argon2id', encodeUser(user)).toString('hex'), salt); // keys are for Argon2id
});

console.log(JSON.stringify(counts));
