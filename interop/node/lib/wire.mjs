// What is under the open connection: bytes of packets, in records where it is sealed, over a socket.

import { MAX_PLAINTEXT } from './records.mjs';

const LINGER = 1000; // ms in which the other side may end, once this one has

export class Wire {
  #socket;
  #sealer;
  #opener;
  #recordSize;
  #over = false;
  #end; // to be called when nothing more can come
  #ended = new Promise((resolve) => { this.#end = resolve; });

  constructor(socket, { sealer, opener }, recordSize = MAX_PLAINTEXT) {
    this.#socket = socket;
    this.#sealer = sealer;
    this.#opener = opener;
    this.#recordSize = recordSize;
  }

  /**
   * `receive(bytes, over)` is told what has come: the bytes that were received, and `over`, null as long as more
   * can come: { error: null } after the other side's end, { error } where the transport failed or was cut.
   * `drained()` is told when more may be written.
   */
  start(receive, drained) {
    const tell = (bytes, over) => {
      if (this.#over) return;
      if (over) {
        this.#over = true;
        this.#end();
      }
      receive(bytes, over);
    };
    const socket = this.#socket;
    socket.on('drain', drained);
    socket.on('data', (bytes) => this.#take(bytes, tell));
    socket.on('end', () => tell(Buffer.alloc(0), { error: this.#opener ? new Error('cut off: no end record') : null }));
    const closed = () => tell(Buffer.alloc(0), { error: socket.errored ?? new Error('closed') });
    socket.on('close', closed);
    if (socket.destroyed) setImmediate(closed); // its event may have been before
    else socket.resume();
  }

  #take(bytes, tell) {
    if (this.#over) return;
    if (!this.#opener) {
      tell(bytes, null);
      return;
    }
    const plaintexts = [];
    let over = null;
    try {
      for (const plaintext of this.#opener.feed(bytes)) plaintexts.push(plaintext);
      if (this.#opener.ended) over = { error: null };
    } catch (error) {
      over = { error };
    }
    if (plaintexts.length || over) tell(Buffer.concat(plaintexts), over);
  }

  /** Whether more should be written now. */
  get writable() {
    return this.#socket.writable && !this.#socket.writableNeedDrain;
  }

  write(bytes) {
    if (!this.#socket.writable) return;
    this.#socket.write(this.#sealer ? this.#sealer.sealAll(bytes, this.#recordSize) : bytes);
  }

  /** Say that nothing follows. */
  writeEnd() {
    if (!this.#socket.writable) return;
    if (this.#sealer) this.#socket.write(this.#sealer.seal(Buffer.alloc(0)));
    else this.#socket.end();
  }

  /** Once this side has ended: read on until the other side ends too, for a while, and close the socket. */
  async linger() {
    const timer = setTimeout(this.#end, LINGER);
    await this.#ended;
    clearTimeout(timer);
    this.close();
  }

  close() {
    this.#socket.destroy();
  }

  /** Write bytes as they are, past the records: for tests. */
  writeRaw(bytes) {
    this.#socket.write(bytes);
  }
}
