// What a server makes of packets that come one after the other: for the test vectors, and for sequences made at random.

import { Connection } from './lib/connection.mjs';
import { ProtocolError, decodeBody, encodePacket } from './lib/packets.mjs';
import { InFlight, Session } from './lib/session.mjs';

const CREDIT = 262_144; // bytes that the server has granted to its own channels

/**
 * `sent` are the requests of the server that have left before: for each, whether it has a channel; and `bye` whether
 * that has left too. `credit` is what it grants to each channel that it takes, in bytes. `packets` are Buffers, each
 * of which is received alone, before anything leaves.
 *
 * Returns the number of the packet that was refused, or null; the requests and items, by id and fields; the ids of
 * the answers; and what the server sends, packet by packet, if it answers by `closing` alone, and whether it ended.
 */
export function judge({ limit, maxRequests, credit, sent, bye, packets }) {
  const { refused, events } = receiveAll(sessionOf({ limit, maxRequests, sent, bye }), packets, credit);
  const withFields = (...kinds) => events.filter(({ kind }) => kinds.includes(kind))
    .map(({ request, body }) => ({ id: String(request.id), fields: body.map((field) => field.toString('hex')) }));
  return {
    refused,
    requests: withFields('req', 'chan'),
    items: withFields('item'),
    answers: events.filter(({ kind }) => kind === 'ok' || kind === 'err').map(({ request }) => String(request.id)),
    ...repliesTo({ limit, maxRequests, credit, sent, bye, packets }),
  };
}

function sessionOf({ limit, maxRequests, sent, bye }) {
  const session = new Session({ client: false, limit, maxRequests });
  for (const [i, channel] of sent.entries()) {
    const request = new InFlight(BigInt(2 * i + 1), 0, channel ? 0 : null, channel ? CREDIT : null);
    request.left = true;
    session.ours.set(request.id, request);
  }
  session.byeLeft = bye;
  return session;
}

function receiveAll(session, packets, credit) {
  const all = [];
  for (const [i, packet] of packets.entries()) {
    const events = [];
    let refused = null;
    try {
      session.receive(packet, events);
    } catch (error) {
      if (!(error instanceof ProtocolError)) throw error;
      refused = i;
    }
    for (const { kind, request } of events) {
      if (kind === 'chan' && !(session.byeLeft && request.depth === 0)) request.receiveCredit += credit;
    }
    all.push(...events);
    if (refused !== null) return { refused, events: all };
  }
  return { refused: null, events: all };
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

function repliesTo({ limit, maxRequests, credit, sent, bye, packets }) {
  const wire = new Nowhere();
  const never = () => new Promise(() => {});
  const connection = new Connection(wire, {
    client: false,
    theirs: { maxMessageSize: BigInt(limit), maxRequests: 100, options: new Map(), room: null },
    settings: { maxMessageSize: limit, maxRequests, window: credit, handler: never, channelHandler: never },
  });
  connection.start();
  for (const channel of sent) {
    (channel ? connection.openChannel([], { window: CREDIT }) : connection.ask([])).catch(() => {});
  }
  if (bye) connection.drain();
  connection.pump();
  wire.sent = [];
  wire.writable = false;
  for (const packet of packets) wire.receive(packet);
  wire.writable = true;
  connection.pump();
  const { ended } = wire;
  connection.close(); // so that no timer of a deadline is left
  const bytes = Buffer.concat(wire.sent);
  const replies = [];
  for (let at = 0; at < bytes.length; at += 4 + bytes.readUInt32BE(at)) {
    const fields = decodeBody(bytes.subarray(at + 4, at + 4 + bytes.readUInt32BE(at)));
    const [kind, , code] = fields.map(String);
    if (kind !== 'err' || code !== 'closing') replies.push({ kind, packet: encodePacket(fields).toString('hex') });
  }
  return { replies, ended };
}
