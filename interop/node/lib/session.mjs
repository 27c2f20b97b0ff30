// What arrives on an open connection: packets out of bytes, each checked against all that came before, without a
// socket ("The open connection" in docs/protocol.rst). What the packets mean comes out as events; what is done about
// them is the business of connection.mjs, once everything that was received is checked.

import { MAX_MESSAGE } from './handshake.mjs';
import { ProtocolError, decodeBody, decodeContext, decodeNumber, decodeText } from './packets.mjs';

export const MAX_WHOLE = 66_560; // bytes of a packet that travels whole
export const MAX_DETAILS = 16_384; // bytes
export const MAX_CREDIT = 0xffff_ffff; // bytes
export const MAX_OPEN = 4; // packets in pieces of one direction
export const MAX_DEPTH = 15;
export const ITEM_COST = 64; // bytes of credit that an item takes beside its body
const NOTHING = Buffer.alloc(0);
/** How many fields a packet of each kind has. */
export const FIELDS = {
  req: 6, chan: 7, ok: 3, err: 5, cancel: 2, item: 3, credit: 3, end: 2, part: 4, drop: 2, ping: 1, pong: 1, bye: 1,
  'bye-ok': 1, abort: 3,
};
const IN_PIECES = new Set(['req', 'chan', 'ok', 'err', 'item']);

/** A request in flight, of either side. The credits are in bytes; that of a request without a channel is null. */
export class InFlight {
  constructor(id, depth, sendCredit, receiveCredit) {
    this.id = id;
    this.depth = depth;
    this.hasChannel = sendCredit !== null;
    this.sendCredit = sendCredit; // what this side may still send
    this.receiveCredit = receiveCredit; // what the other side may still send
    this.endCame = false;
    this.left = false; // all of our own request was handed to the transport
  }

  get slotClass() {
    return `${this.hasChannel ? 'chan' : 'req'} ${this.depth}`;
  }
}

export class Session {
  /** `limit` in bytes, `maxRequests` of the other side at once, of each class. */
  constructor({ client, limit, maxRequests }) {
    this.limit = limit;
    this.maxRequests = maxRequests;
    this.ownParity = client ? 0n : 1n;
    this.ours = new Map(); // our requests without an answer, by id
    this.theirs = new Map(); // their requests whose answer has not left, by id
    this.byeLeft = false; // our bye was handed to the transport
    this.byeCame = false;
    this.byeOkCame = false;
    this.aborted = false;
    this.#limitNow = Math.min(limit, MAX_WHOLE);
  }

  #limitNow;
  #unread = NOTHING;
  #slotsTaken = new Map();
  #pieces = new Map(); // open packets: n to { left, parts }

  /** Whether the bytes so far end inside a packet. */
  get insidePacket() {
    return this.#unread.length > 0;
  }

  /** Take bytes; append to `events` what they mean. At a ProtocolError the events before it count. */
  receive(bytes, events) {
    this.#unread = this.#unread.length ? Buffer.concat([this.#unread, bytes]) : bytes;
    while (!this.aborted && this.#unread.length >= 4) {
      const length = this.#unread.readUInt32BE(0);
      if (length > this.#limitNow) throw new ProtocolError(`a packet of ${length} bytes; the limit is ${this.#limitNow}`);
      if (this.#unread.length < 4 + length) return;
      const body = this.#unread.subarray(4, 4 + length);
      this.#unread = this.#unread.subarray(4 + length);
      const event = this.#packet(decodeBody(body));
      if (event !== null) events.push(event);
    }
  }

  /** The answer to their request leaves with the next bytes: the slot is free. */
  answerLeaves(request) {
    this.theirs.delete(request.id);
    this.#slotsTaken.set(request.slotClass, this.#slotsTaken.get(request.slotClass) - 1);
  }

  #packet(fields, inPieces = false) {
    const kind = fields[0]?.toString('latin1');
    if (kind === 'abort' && !inPieces) this.aborted = true; // first: what is wrong with an abort is not answered by another
    if (kind === undefined || !Object.hasOwn(FIELDS, kind)) throw new ProtocolError('a packet of an unknown kind');
    if (fields.length !== FIELDS[kind]) throw new ProtocolError(`${kind} with ${fields.length} fields`);
    if (inPieces && !IN_PIECES.has(kind)) throw new ProtocolError(`${kind} in pieces`);
    switch (kind) {
      case 'req': case 'chan': return this.#request(kind, fields);
      case 'ok': case 'err': return this.#answer(kind, fields);
      case 'item': return this.#item(fields);
      case 'credit': return this.#credit(fields);
      case 'end': return this.#end(fields);
      case 'cancel': return this.#cancel(fields);
      case 'part': return this.#part(fields);
      case 'drop': return this.#drop(fields);
      case 'ping': case 'pong': return { kind };
      case 'bye': return this.#once('byeCame', kind);
      case 'bye-ok':
        if (!this.byeLeft) throw new ProtocolError('bye-ok without bye');
        return this.#once('byeOkCame', kind);
      case 'abort': return this.#abort(fields);
    }
    throw new Error(`no rule for ${kind}`);
  }

  #once(flag, kind) {
    if (this[flag]) throw new ProtocolError(`a second ${kind}`);
    this[flag] = true;
    return { kind };
  }

  #request(kind, fields) {
    const id = decodeNumber(fields[1], 'id');
    const timeout = fields[2].length ? decodeNumber(fields[2], 'timeout') : null;
    const depth = fields[3].length ? decodeNumber(fields[3], 'depth') : null;
    if (depth !== null && (depth < 1n || depth > MAX_DEPTH)) throw new ProtocolError('invalid depth');
    const context = decodeContext(fields[4]);
    const credit = kind === 'chan' ? decodeNumber(fields[5], 'credit') : null;
    if (credit > MAX_CREDIT) throw new ProtocolError('too much credit');
    const body = decodeBody(fields.at(-1));
    if (this.#isOurs(id)) throw new ProtocolError(`${kind} with an id of the receiver's`);
    if (this.theirs.has(id)) throw new ProtocolError(`${kind} with an id that is in flight`);
    const request = new InFlight(id, Number(depth ?? 0n), credit === null ? null : Number(credit), credit === null ? null : 0);
    if (this.byeOkCame && request.depth === 0) throw new ProtocolError(`${kind} of depth 0 after bye-ok`);
    const taken = this.#slotsTaken.get(request.slotClass) ?? 0;
    if (taken >= this.maxRequests) throw new ProtocolError(`${kind} without a free slot`);
    this.#slotsTaken.set(request.slotClass, taken + 1);
    this.theirs.set(id, request);
    return { kind, request, timeout, context, body };
  }

  #answer(kind, fields) {
    const id = decodeNumber(fields[1], 'id');
    const event = { kind };
    if (kind === 'ok') event.body = decodeBody(fields[2]);
    else {
      event.code = decodeText(fields[2], 'code');
      event.message = decodeText(fields[3], 'message');
      event.details = fields[4];
      if (event.details.length > MAX_DETAILS) throw new ProtocolError('details are too long');
    }
    event.request = this.ours.get(id);
    if (!event.request?.left) throw new ProtocolError(`${kind} with an id that waits for no answer`);
    this.ours.delete(id);
    return event;
  }

  #cancel(fields) {
    const id = decodeNumber(fields[1], 'id');
    if (this.#isOurs(id)) throw new ProtocolError("cancel with an id of the receiver's");
    const request = this.theirs.get(id);
    return request ? { kind: 'cancel', request } : null;
  }

  #item(fields) {
    const request = this.#withChannel('item', fields[1]);
    const body = decodeBody(fields[2]);
    if (request === null) return null;
    if (request.endCame) throw new ProtocolError('item after end');
    if (request.receiveCredit <= 0) throw new ProtocolError('item without credit');
    const cost = fields[2].length + ITEM_COST;
    request.receiveCredit -= cost;
    return { kind: 'item', request, body, cost };
  }

  #credit(fields) {
    const request = this.#withChannel('credit', fields[1]);
    const bytes = decodeNumber(fields[2], 'bytes');
    if (request === null) return null;
    if (BigInt(request.sendCredit) + bytes > MAX_CREDIT) throw new ProtocolError('too much credit');
    request.sendCredit += Number(bytes);
    return { kind: 'credit', request };
  }

  #end(fields) {
    const request = this.#withChannel('end', fields[1]);
    if (request === null) return null;
    if (request.endCame) throw new ProtocolError('a second end');
    request.endCame = true;
    return { kind: 'end', request };
  }

  /** The request in flight with this id, or null where a packet about it is to be ignored. */
  #withChannel(kind, field) {
    const id = decodeNumber(field, 'id');
    const request = this.#isOurs(id) ? this.ours.get(id) : this.theirs.get(id);
    if (!request || (this.#isOurs(id) && !request.left)) return null;
    if (!request.hasChannel) throw new ProtocolError(`${kind} with the id of a request without a channel`);
    return request;
  }

  #part(fields) {
    const n = decodeNumber(fields[1], 'n');
    const left = decodeNumber(fields[2], 'left');
    const piece = fields[3];
    if (piece.length === 0) throw new ProtocolError('an empty piece');
    let packet = this.#pieces.get(n);
    if (packet === undefined) {
      if (left + BigInt(piece.length) > this.limit) throw new ProtocolError('a packet in pieces over the limit');
      if (this.#pieces.size === MAX_OPEN) throw new ProtocolError('too many packets in pieces at once');
      packet = { parts: [] };
      this.#pieces.set(n, packet);
    } else if (left !== packet.left - BigInt(piece.length)) throw new ProtocolError('left of a part does not fit');
    packet.left = left;
    packet.parts.push(Buffer.from(piece)); // a copy: what was received around it must not stay
    if (left > 0n) return null;
    this.#pieces.delete(n);
    return this.#packet(decodeBody(Buffer.concat(packet.parts)), true);
  }

  #drop(fields) {
    if (!this.#pieces.delete(decodeNumber(fields[1], 'n'))) throw new ProtocolError('drop of a packet that is not open');
    return null;
  }

  #abort(fields) {
    const [code, message] = [decodeText(fields[1], 'code'), decodeText(fields[2], 'message')];
    if (fields[2].length > MAX_MESSAGE) throw new ProtocolError('the message of abort is too long');
    return { kind: 'abort', code, message };
  }

  #isOurs(id) {
    return id % 2n === this.ownParity;
  }
}
