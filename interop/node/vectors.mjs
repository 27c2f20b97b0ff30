// Check tests/support/vectors.json: `node vectors.mjs FILE` prints how many of each kind hold, or fails with the first that does not.

import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { judge } from './judge.mjs';
import { B } from './lib/crypto.mjs';
import { ClientHandshake, NotAuthenticated, Refused, ServerHandshake } from './lib/handshake.mjs';
import { packetInRecord } from './lib/opening.mjs';
import {
  ProtocolError, decodeBody, decodeNumber, decodeOptions, encodeOptions, encodePacket, encodeUser, userIn,
} from './lib/packets.mjs';
import { MAX_BOX, Opener, Sealer, boxLength } from './lib/records.mjs';
import { Session } from './lib/session.mjs';

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

// The open connection.

const { max_message_size: limit, max_requests: maxRequests, credit } = vectors.connection;

/** The requests of the server that have left before the packets come: for each, whether it has a channel. */
const SENT = { connectionGood: [false, false, true], connectionBad: [], sequences: [true, false] };

const judged = (packets, sent, bye) => judge({ limit, maxRequests, credit, sent, bye, packets: hexes(packets) });

function checkRefused(packets, sent, bye) {
  const { refused, replies, ended } = judged(packets, sent, bye);
  assert.equal(refused, packets.length - 1);
  assert.ok(ended);
  const isAbort = hex(packets.at(-1)).subarray(9).toString('latin1').startsWith('abort'); // which no abort answers
  const aborts = replies.flatMap(({ kind }, i) => (kind === 'abort' ? [i] : []));
  assert.deepEqual(aborts, isAbort ? [] : [replies.length - 1]);
}

each('connection.good', vectors.connection.good, ({ fields, packet }) => {
  assert.equal(encodePacket(hexes(fields)).toString('hex'), packet);
  const kind = hex(fields[0]).toString();
  const before = kind === 'drop' ? [vectors.connection.good.find(({ name }) => name === 'part').packet] : [];
  const { refused, ended } = judged([...before, packet], SENT.connectionGood, kind === 'bye-ok');
  assert.equal(refused, null);
  assert.equal(ended, kind === 'abort');
});
each('connection.bad', vectors.connection.bad, ({ packet }) => checkRefused([packet], SENT.connectionBad, false));
each('sequences.good', vectors.sequences.good, ({ bye, packets, requests, items, replies }) => {
  const result = judged(packets, SENT.sequences, bye);
  const withNumbers = (list) => list.map(({ id, fields }) => ({ id: Number(id), fields }));
  assert.equal(result.refused, null);
  assert.deepEqual(withNumbers(result.requests), requests);
  assert.deepEqual(withNumbers(result.items), items);
  assert.equal(result.replies.map(({ packet }) => packet).join(''), replies);
});
each('sequences.bad', vectors.sequences.bad, ({ bye, packets }) => checkRefused(packets, SENT.sequences, bye));
each('passphrases', vectors.passphrases, ({ user, salt }) => {
  assert.equal(B(16, null, 'bokbok1 argon2id', encodeUser(user)).toString('hex'), salt); // keys are for Argon2id
});

console.log(JSON.stringify(counts));
