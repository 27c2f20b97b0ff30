// Records: the sealed units of the encrypted stream ("Records" in docs/protocol.rst).

import { seal, unseal } from './crypto.mjs';
import { ProtocolError } from './packets.mjs';

const AUTHENTICATOR = 16; // bytes of a box beyond its plaintext
export const MAX_BOX = 65_535; // what the u16 can say
export const MAX_BOX_IN_HANDSHAKE = 4096 + AUTHENTICATOR;
export const MAX_PLAINTEXT = MAX_BOX - AUTHENTICATOR;

/** One direction of a record stream: its key, and how many records it had. */
class Direction {
  #key;
  #count = 0n;

  constructor(key) {
    this.#key = key;
  }

  next(use, bytes) {
    const nonce = Buffer.alloc(24);
    nonce.writeBigUInt64BE(this.#count, 16);
    this.#count += 1n;
    return use(this.#key, nonce, bytes);
  }
}

/** Seals what leaves. */
export class Sealer {
  #direction;

  constructor(key) {
    this.#direction = new Direction(key);
  }

  /** One record of up to MAX_PLAINTEXT bytes; of none, the end record. */
  seal(plaintext) {
    const box = this.#direction.next(seal, plaintext);
    const length = Buffer.alloc(2);
    length.writeUInt16BE(box.length);
    return Buffer.concat([length, box]);
  }

  /** The bytes as records, each of `size` bytes at most. */
  sealAll(bytes, size = MAX_PLAINTEXT) {
    const records = [];
    for (let at = 0; at < bytes.length; at += size) records.push(this.seal(bytes.subarray(at, at + size)));
    return Buffer.concat(records);
  }
}

/** Opens what arrives. `ended` is true after the end record. */
export class Opener {
  #direction;
  #unread = Buffer.alloc(0);
  ended = false;

  constructor(key) {
    this.#direction = new Direction(key);
  }

  /** The plaintext of one box. */
  open(box) {
    const plaintext = this.#direction.next(unseal, box);
    if (plaintext === null) throw new ProtocolError('a record does not open');
    return plaintext;
  }

  /**
   * Take bytes of the transport; yield the plaintext of each record that is whole. ProtocolError at a
   * record that must be refused: what was yielded before it counts, nothing after it may be used.
   */
  *feed(bytes) {
    this.#unread = this.#unread.length ? Buffer.concat([this.#unread, bytes]) : bytes;
    while (!this.ended && this.#unread.length >= 2) {
      const length = boxLength(this.#unread, MAX_BOX);
      if (this.#unread.length < 2 + length) return;
      const plaintext = this.open(this.#unread.subarray(2, 2 + length));
      this.#unread = this.#unread.subarray(2 + length);
      if (plaintext.length === 0) this.ended = true;
      else yield plaintext;
    }
  }
}

/** The length in the first two bytes of a record. */
export function boxLength(start, limit) {
  const length = start.readUInt16BE(0);
  if (length < AUTHENTICATOR || length > limit) throw new ProtocolError(`a record of ${length} bytes`);
  return length;
}
