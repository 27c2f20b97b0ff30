// The handshake, as messages in and messages out, without a socket ("The handshake" in docs/protocol.rst).
// The names h0, hs, h1, h2 and fk are those of the text. Each class takes its steps in the order of its methods.

import { B, publicKeyOf, randomBytes, sameSecret, seal, unseal, x25519 } from './crypto.mjs';
import {
  ProtocolError, decodeBody, decodeNumber, decodeOptions, decodeText, encodeOptions, encodePacket, encodeUser, userIn,
} from './packets.mjs';

const MAGIC = Buffer.from('bokbok1\n');
const NONE = Buffer.alloc(0);
const OPEN_SIZE = 512; // bytes of `open` in mode sealed, its length included
const PAD_AND_FIELDS = 395; // bytes of `open` for the pad and the four fields before it
const BOX_SIZE = 80;
const MAX_KEYS = 16; // keys of one user that a server tries
export const MAX_MESSAGE = 256; // bytes of the message of `refused` and `abort`
export const LEAST_MESSAGE_SIZE = 4096;
const MOST_REQUESTS = 1_000_000;
const REFUSALS = new Set(['authentication', 'busy', 'stopping']);

/** The server refused this client. */
export class Refused extends Error {
  constructor(code, message) {
    super(message || code);
    this.code = code;
  }
}

/** The server does not have the key. */
export class NotAuthenticated extends ProtocolError {}

/** One option of no meaning, so that all others keep on ignoring what they do not know. */
export function grease() {
  return [`grease.${randomBytes(2).toString('hex')}`, randomBytes(randomBytes(1)[0] % 9)];
}

export function helloSize(mode) {
  return mode === 'sealed' ? 78 : 45;
}

/** The first bytes of the hello that must come: all but the public key. */
function helloStart(side, mode) {
  const key = mode === 'sealed' ? Buffer.alloc(32) : NONE;
  const hello = Buffer.concat([MAGIC, encodePacket(['hello', side, mode, key])]);
  return hello.subarray(0, hello.length - key.length);
}

/**
 * What both sides share. `settings`: mode, service, maxMessageSize (bytes), maxRequests, options (a Map).
 * `secret` is for test vectors alone; `random` too.
 */
class Handshake {
  constructor(side, settings, { secret = null } = {}) {
    this.side = side;
    this.other = side === 'client' ? 'server' : 'client';
    this.sealed = settings.mode === 'sealed';
    this.settings = settings;
    this.service = Buffer.from(settings.service, 'utf8');
    if (!settings.service.isWellFormed() || this.service.length > 255) throw new RangeError('invalid service name');
    if (!this.sealed && this.service.length) throw new RangeError('a service name has no effect in mode plain');
    this.secret = this.sealed ? secret ?? randomBytes(32) : NONE;
    this.publicKey = this.sealed ? publicKeyOf(this.secret) : NONE;
    this.ownHello = Buffer.concat([helloStart(side, settings.mode), this.publicKey]);
    this.declared = [String(settings.maxMessageSize), String(settings.maxRequests), encodeOptions(settings.options)];
  }

  /** Refuse the first bytes of the other side's hello as soon as they cannot begin one. */
  checkHelloSoFar(bytes) {
    const expected = helloStart(this.other, this.settings.mode);
    const size = Math.min(bytes.length, expected.length);
    if (!bytes.subarray(0, size).equals(expected.subarray(0, size))) {
      throw new ProtocolError(`this is no hello of a ${this.other} in mode ${this.settings.mode}`);
    }
  }

  /** Take the other side's hello; in mode sealed make `hs`. */
  receiveHello(hello) {
    this.checkHelloSoFar(hello);
    if (hello.length !== helloSize(this.settings.mode)) throw new ProtocolError('a hello of a wrong size');
    if (!this.sealed) return;
    const key = hello.subarray(-32);
    if (key.equals(this.publicKey)) throw new ProtocolError("the other side's public key is our own");
    this.ee = x25519(this.secret, key);
    if (this.ee.every((byte) => byte === 0)) throw new ProtocolError('a public key of low order');
    const [C, S] = this.side === 'client' ? [this.ownHello, hello] : [hello, this.ownHello];
    this.h0 = B(32, null, 'bokbok1 hello', C, S);
    this.hs = B(64, this.ee, 'bokbok1 shake', this.h0);
  }

  /** Halve `hs` or `fk` into the keys of what this side sends and of what it receives. */
  directions(keys) {
    const [client, server] = [keys.subarray(0, 32), keys.subarray(32)];
    return this.side === 'client' ? { send: client, receive: server } : { send: server, receive: client };
  }

  makeH1(O) {
    this.h1 = B(32, null, 'bokbok1 open', this.h0, Buffer.of(this.service.length), this.service, O);
  }

  makeH2(box, A) {
    this.h2 = B(32, null, 'bokbok1 accept', this.h1, box, A);
  }

  makeFk(key, sessionKey) {
    this.fk = B(64, key, 'bokbok1 final', sessionKey, this.ee, this.h2);
  }

  /** Let go of all secrets of the handshake, whether it succeeded or not. */
  forget() {
    for (const name of ['secret', 'ee', 'hs', 'sessionKey', 'fk']) {
      this[name]?.fill(0);
      this[name] = null;
    }
  }
}

/** The handshake of a client. */
export class ClientHandshake extends Handshake {
  /** `settings` as above, and user and key (32 bytes) in mode sealed. */
  constructor(settings, fixed = {}) {
    super('client', settings, fixed);
    this.user = this.sealed ? encodeUser(settings.user) : NONE;
    if (this.sealed && settings.key?.length !== 32) throw new RangeError('a key is 32 bytes');
    this.sessionKey = this.sealed ? fixed.sessionKey ?? randomBytes(32) : null;
  }

  /** The packet `open`. */
  open() {
    if (!this.sealed) return encodePacket(['open', '', ...this.declared, '', '']);
    const fields = ['open', this.user, ...this.declared];
    const taken = fields.slice(1).reduce((sum, field) => sum + field.length, 0);
    fields.push(Buffer.alloc(PAD_AND_FIELDS - taken));
    this.makeH1(encodePacket(fields));
    const boxKey = B(32, this.settings.key, 'bokbok1 box', this.h1);
    this.box = seal(boxKey, this.h1.subarray(0, 24), Buffer.concat([this.sessionKey, this.h1]));
    return encodePacket([...fields, this.box]);
  }

  /** Take the body of the server's answer. Returns what the server declared; throws Refused if it refused. */
  receiveAnswer(body) {
    const fields = decodeBody(body);
    const kind = fields[0]?.toString('latin1');
    if (kind === 'refused' && fields.length === 3) throw refusedWith(fields);
    if (kind !== 'accepted' || fields.length !== 5) throw new ProtocolError('neither accepted nor refused');
    const proof = fields[4];
    if (this.sealed) {
      this.makeH2(this.box, encodePacket(fields.slice(0, 4)));
      if (!sameSecret(proof, B(32, this.settings.key, 'bokbok1 server', this.h2))) {
        throw new NotAuthenticated('the server does not have the key');
      }
      this.makeFk(this.settings.key, this.sessionKey);
    } else if (proof.length) throw new ProtocolError('a proof in mode plain');
    return declaredIn(fields.slice(1, 4));
  }
}

/** The handshake of a server. */
export class ServerHandshake extends Handshake {
  constructor(settings, fixed = {}) {
    super('server', settings, fixed);
  }

  /** Take the body of `open` and check its form. Returns the name of the user, or null if it is invalid. */
  receiveOpen(body) {
    const fields = decodeBody(body);
    if (fields.length !== 7 || fields[0].toString('latin1') !== 'open') throw new ProtocolError('this is no open');
    const [, user, , , , pad, box] = fields;
    if (this.sealed) {
      if (4 + body.length !== OPEN_SIZE) throw new ProtocolError('open is not of 512 bytes');
      if (box.length !== BOX_SIZE || !pad.every((byte) => byte === 0)) throw new ProtocolError('invalid box or pad');
      this.makeH1(encodePacket(fields.slice(0, 6)));
      this.box = box;
    } else if (user.length || pad.length || box.length) throw new ProtocolError('secrets in mode plain');
    this.declaredByClient = declaredIn(fields.slice(2, 5));
    return this.sealed ? userIn(user) : '';
  }

  /** Whether one of these keys opens the box. As many are tried whatever the user. */
  openBox(keys) {
    this.key = null;
    for (let i = 0; i < MAX_KEYS; i += 1) {
      const key = keys[i] ?? randomBytes(32);
      const boxKey = B(32, key, 'bokbok1 box', this.h1);
      const inside = unseal(boxKey, this.h1.subarray(0, 24), this.box);
      if (inside !== null && sameSecret(inside.subarray(32), this.h1) && this.key === null) {
        this.key = key;
        this.sessionKey = inside.subarray(0, 32);
      }
    }
    return this.key !== null;
  }

  /** The packet `accepted`; in mode sealed it makes `fk`. */
  accepted() {
    const fields = ['accepted', ...this.declared];
    if (!this.sealed) return encodePacket([...fields, '']);
    this.makeH2(this.box, encodePacket(fields));
    this.makeFk(this.key, this.sessionKey);
    return encodePacket([...fields, B(32, this.key, 'bokbok1 server', this.h2)]);
  }

  /** The packet `refused`. */
  refused(code, message) {
    return encodePacket(['refused', code, message]);
  }
}

function refusedWith([, codeField, messageField]) {
  const code = codeField.toString('latin1');
  if (messageField.length > MAX_MESSAGE) return new ProtocolError('the message of refused is too long');
  const message = decodeText(messageField, 'the message of refused');
  return REFUSALS.has(code) ? new Refused(code, message) : new ProtocolError('refused with an unknown code');
}

function declaredIn([size, requests, options]) {
  const maxMessageSize = decodeNumber(size, 'max_message_size');
  const maxRequests = Number(decodeNumber(requests, 'max_requests'));
  if (maxMessageSize < LEAST_MESSAGE_SIZE) throw new ProtocolError('max_message_size is too small');
  if (maxRequests < 1 || maxRequests > MOST_REQUESTS) throw new ProtocolError('max_requests is out of range');
  const theirs = { maxMessageSize, maxRequests, options: decodeOptions(options), room: null };
  const room = theirs.options.get('room');
  if (room !== undefined) theirs.room = Number(decodeNumber(room, 'room'));
  return theirs;
}
