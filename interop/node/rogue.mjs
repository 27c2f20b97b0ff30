// A wire that breaks the protocol at random points, so that the other side can show what it makes of it.

import { encodePacket } from './lib/packets.mjs';
import { FIELDS } from './lib/session.mjs';

/** A generator of the same numbers for the same seed (mulberry32). */
function random(seed) {
  let state = seed >>> 0;
  return (below) => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) % below;
  };
}

const KINDS = [...Object.keys(FIELDS), '', 'hello'];
const VALUES = [
  '', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', '15', '16', '00', '-1', '999999999999999999', '4294967295', '\xff',
  '\x00', '\x01\x00\x00\x00\x04ping', '\x01\x00\x00\x00\x05hold', // bodies
];

/** Spoils about one of `oneIn` of the writes, each in a way that `seed` chooses. */
export class Rogue {
  #wire;
  #random;
  #oneIn;

  constructor(wire, { seed, oneIn }) {
    this.#wire = wire;
    this.#random = random(seed);
    this.#oneIn = oneIn;
  }

  get writable() { return this.#wire.writable; }
  start(...all) { this.#wire.start(...all); }
  writeEnd() { this.#wire.writeEnd(); }
  linger() { return this.#wire.linger(); }
  close() { this.#wire.close(); }

  write(bytes) {
    if (this.#random(this.#oneIn)) this.#wire.write(bytes);
    else this.#spoil(bytes);
  }

  #spoil(bytes) {
    const at = this.#random(bytes.length);
    const some = this.#random(40);
    switch (this.#random(9)) {
      case 0: case 1: case 2: // a packet that looks right
        this.#wire.write(Buffer.concat([bytes, this.#packet()]));
        break;
      case 3: // one byte is another
        bytes[at] ^= 1 << this.#random(8);
        this.#wire.write(bytes);
        break;
      case 4: // bytes are missing
        this.#wire.write(Buffer.concat([bytes.subarray(0, at), bytes.subarray(at + some)]));
        break;
      case 5: // bytes are there twice, packets perhaps
        this.#wire.write(Buffer.concat([bytes, bytes]));
        break;
      case 6: // the end comes too early
        this.#wire.write(bytes.subarray(0, at));
        this.#wire.writeEnd();
        break;
      case 7: // neither records nor packets
        this.#wire.write(bytes);
        this.#wire.writeRaw(Buffer.from(Array.from({ length: 1 + some }, () => this.#random(256))));
        break;
      case 8: // cut
        this.#wire.write(bytes.subarray(0, at));
        this.#wire.close();
    }
  }

  /** A packet of a kind that is there, or nearly, with likely fields. */
  #packet() {
    const kind = KINDS[this.#random(KINDS.length)];
    const fields = [kind];
    const count = this.#random(4) ? FIELDS[kind] ?? 1 : this.#random(8);
    while (fields.length < count) fields.push(VALUES[this.#random(VALUES.length)]);
    return encodePacket(fields.map((field) => Buffer.from(field, 'latin1')));
  }
}
