// What waits to leave, and in which order it leaves ("Pieces" and "Order" in docs/protocol.rst).
//
// Control packets leave first. The packets of one id leave in the order they arose, each wholly before the next:
// they stand in a lane. The heads of all lanes leave in the order they became heads. A large one leaves in pieces,
// four of them at once taking turns, and small ones go in between.

import { encodePacket, withLength } from './packets.mjs';
import { MAX_OPEN, MAX_WHOLE } from './session.mjs';

export const PIECE_SIZE = 65_458; // bytes: with it a part just fits one record
const BETWEEN_PIECES = 128 * 1024; // bytes of other packets, while pieces wait

/** A packet that waits: `encode()` gives its body when its first byte leaves, `leaves()` is told of its last. */
export class Entry {
  constructor(id, kind, encode, leaves = () => {}) {
    this.id = id;
    this.kind = kind;
    this.encode = encode;
    this.leaves = leaves;
    this.state = 'waiting'; // then 'open' while pieces leave, then 'left' or 'taken back'
  }
}

export class Outbox {
  #control = [];
  #lanes = new Map(); // id to the entries that have not wholly left
  #heads = []; // entries that may leave now
  #large = []; // heads that are to leave in pieces, once there is room
  #open = []; // entries of which some pieces left, with their rest
  #nextPacket = 0n;
  #sincePiece = 0; // bytes of other packets since the last piece

  /** Packets over `wholeUpTo` bytes leave in pieces of `pieceSize`. */
  constructor({ wholeUpTo = MAX_WHOLE, pieceSize = PIECE_SIZE } = {}) {
    this.wholeUpTo = wholeUpTo;
    this.pieceSize = pieceSize;
  }

  get empty() {
    return !this.#control.length && !this.#lanes.size;
  }

  /** A control packet; `leaves()` is told when it is handed to the transport. */
  addControl(fields, leaves = () => {}) {
    this.#control.push({ packet: encodePacket(fields), leaves });
  }

  add(entry) {
    const lane = this.#lanes.get(entry.id);
    if (lane) lane.push(entry);
    else {
      this.#lanes.set(entry.id, [entry]);
      this.#heads.push(entry);
    }
  }

  /** Let an entry not leave: if pieces of it have left, `drop` follows. False where it has wholly left already. */
  takeBack(entry) {
    if (entry.state === 'left') return false;
    if (entry.state === 'open') this.addControl(['drop', String(entry.n)]);
    this.#remove(entry);
    entry.state = 'taken back';
    return true;
  }

  /** Take back the items of a channel and its end. */
  takeBackItems(id) {
    for (const entry of [...(this.#lanes.get(id) ?? [])]) {
      if (entry.kind === 'item' || entry.kind === 'end') this.takeBack(entry);
    }
  }

  /** Forget all that waits, the rest of what is in pieces too. */
  clear() {
    this.#control = [];
    this.#lanes.clear();
    this.#heads = [];
    this.#large = [];
    this.#open = [];
  }

  /** The next packet to hand to the transport, or null. */
  next() {
    if (this.#control.length) {
      const { packet, leaves } = this.#control.shift();
      leaves();
      return packet;
    }
    for (;;) {
      const piecesWait = this.#open.length || this.#large.length;
      if (piecesWait && (!this.#heads.length || this.#sincePiece >= BETWEEN_PIECES)) return this.#piece();
      if (!this.#heads.length) return null;
      const entry = this.#heads.shift();
      const body = entry.encode();
      if (body.length <= this.wholeUpTo) {
        this.#sincePiece += body.length;
        this.#left(entry);
        return withLength(body);
      }
      this.#large.push(entry);
    }
  }

  #piece() {
    if (this.#large.length && this.#open.length < MAX_OPEN) {
      const entry = this.#large.shift();
      entry.rest = entry.encode(); // anew: the time left is that of the first piece
      entry.n = this.#nextPacket;
      entry.state = 'open';
      this.#nextPacket += 1n;
      this.#open.unshift(entry);
    }
    const entry = this.#open.shift();
    const piece = entry.rest.subarray(0, this.pieceSize);
    entry.rest = entry.rest.subarray(this.pieceSize);
    this.#sincePiece = 0;
    if (entry.rest.length) this.#open.push(entry);
    else this.#left(entry);
    return encodePacket(['part', String(entry.n), String(entry.rest.length), piece]);
  }

  #left(entry) {
    this.#remove(entry);
    entry.state = 'left';
    entry.leaves();
  }

  #remove(entry) {
    const lane = this.#lanes.get(entry.id);
    const wasHead = lane[0] === entry;
    lane.splice(lane.indexOf(entry), 1);
    for (const list of [this.#heads, this.#large, this.#open]) {
      const at = list.indexOf(entry);
      if (at >= 0) list.splice(at, 1);
    }
    if (!lane.length) this.#lanes.delete(entry.id);
    else if (wasHead) this.#heads.push(lane[0]);
  }
}
