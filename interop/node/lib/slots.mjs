// The slots of one class: how many requests the other side takes at once of a depth and a kind, and how many bytes
// ("Slots" and "Room" in docs/protocol.rst).

const SMALL = 4096; // bytes of a body that may be left out of the room

export class Slots {
  waiting = []; // calls that wait for a slot
  #free;
  #share; // bytes of the other side's room that are for this class
  #bytes = 0; // bytes of that which are taken

  constructor({ maxRequests, room }, depth, hasChannel) {
    this.depth = depth;
    this.#free = maxRequests;
    this.#share = room === null ? Infinity : (room / 2 ** (depth + 1)) * (hasChannel ? 1 / 4 : 3 / 4);
  }

  /** Whether the first that waits may have a slot: one that is too large for the share has it all. */
  get hasOne() {
    if (!this.waiting.length || !this.#free) return false;
    const bytes = counted(this.waiting[0]);
    return bytes === 0 || this.#bytes === 0 || this.#bytes + bytes <= this.#share;
  }

  /** The first that waits, which has a slot now. */
  take() {
    const call = this.waiting.shift();
    this.#free -= 1;
    this.#bytes += counted(call);
    return call;
  }

  free(call) {
    this.#free += 1;
    this.#bytes -= counted(call);
  }
}

function counted({ size }) {
  return size < SMALL ? 0 : size;
}
