// The handshake over a socket. A side reads no more than the message it waits for; the rest goes back to the socket.

import { once } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import { ClientHandshake, Refused, ServerHandshake, helloSize } from './handshake.mjs';
import { ProtocolError } from './packets.mjs';
import { MAX_BOX_IN_HANDSHAKE, Opener, Sealer, boxLength } from './records.mjs';

const MAX_PACKET = 4096; // bytes of a packet in mode plain before the connection is open
const AUTHENTICATION_DELAY = 500; // ms from `open` to `refused`, whatever was wrong
const LINGER = 1000; // ms for the other side to read what it was sent last
export const HANDSHAKE_TIMEOUT = 10_000; // ms

/** As a client: returns { sealer, opener, theirs }, the first two null in mode plain. */
export async function openAsClient(socket, settings) {
  const handshake = new ClientHandshake(settings);
  return within(socket, handshake, async () => {
    if (!handshake.sealed) {
      socket.write(Buffer.concat([handshake.ownHello, handshake.open()]));
      await readHello(socket, handshake);
    } else {
      socket.write(handshake.ownHello);
      await readHello(socket, handshake);
    }
    const records = recordsUnder(handshake, handshake.hs);
    if (handshake.sealed) socket.write(records.sealer.seal(handshake.open()));
    const theirs = handshake.receiveAnswer(await readPacket(socket, records.opener));
    return { ...recordsUnder(handshake, handshake.fk), theirs };
  });
}

/**
 * As a server: returns the same and the user. `settings.keysOf(user)` is a list of keys, in mode sealed.
 * `settings.refuse(user)` may give a [code, message] to refuse a client that is known. Throws Refused then.
 */
export async function openAsServer(socket, settings) {
  const handshake = new ServerHandshake(settings);
  return within(socket, handshake, async () => {
    await readHello(socket, handshake);
    socket.write(handshake.ownHello);
    const records = recordsUnder(handshake, handshake.hs);
    const send = (packet) => socket.write(records.sealer?.seal(packet) ?? packet);
    const refuse = async (code, message) => {
      send(handshake.refused(code, message));
      await linger(socket);
      throw new Refused(code, message);
    };
    const user = handshake.receiveOpen(await readPacket(socket, records.opener));
    const earliest = sleep(AUTHENTICATION_DELAY);
    if (handshake.sealed && !handshake.openBox((user !== null && settings.keysOf(user)) || [])) {
      await earliest;
      await refuse('authentication', 'wrong user or key');
    }
    const refusal = settings.refuse?.(user);
    if (refusal) await refuse(...refusal);
    send(handshake.accepted());
    return { ...recordsUnder(handshake, handshake.fk), theirs: handshake.declaredByClient, user };
  });
}

/** Run a handshake; end the connection, saying nothing more, where it fails or takes too long. */
async function within(socket, handshake, run) {
  const { handshakeTimeout = HANDSHAKE_TIMEOUT } = handshake.settings;
  const timer = setTimeout(() => socket.destroy(new Error('the handshake took too long')), handshakeTimeout);
  try {
    return await run();
  } catch (error) {
    socket.destroy();
    throw error;
  } finally {
    clearTimeout(timer);
    handshake.forget();
  }
}

function recordsUnder(handshake, keys) {
  if (!handshake.sealed) return { sealer: null, opener: null };
  const { send, receive } = handshake.directions(keys);
  return { sealer: new Sealer(Buffer.from(send)), opener: new Opener(Buffer.from(receive)) };
}

async function readHello(socket, handshake) {
  const size = helloSize(handshake.settings.mode);
  handshake.receiveHello(await read(socket, size, (sofar) => handshake.checkHelloSoFar(sofar)));
}

/** The body of the next packet; in mode sealed it is exactly one record. */
async function readPacket(socket, opener) {
  if (opener === null) {
    const length = (await read(socket, 4)).readUInt32BE(0);
    if (length === 0 || length > MAX_PACKET) throw new ProtocolError(`a packet of ${length} bytes`);
    return read(socket, length);
  }
  const box = await read(socket, boxLength(await read(socket, 2), MAX_BOX_IN_HANDSHAKE));
  return packetInRecord(opener.open(box));
}

/** The body of the packet that is all of this plaintext. */
export function packetInRecord(plaintext) {
  if (plaintext.length < 4 || plaintext.readUInt32BE(0) !== plaintext.length - 4) {
    throw new ProtocolError('a record of the handshake that is not exactly one packet');
  }
  return plaintext.subarray(4);
}

/** Exactly so many bytes. `check` sees them as they come. */
async function read(socket, size, check = null) {
  let bytes = Buffer.alloc(0);
  for (;;) {
    const more = socket.read();
    if (more !== null) {
      bytes = Buffer.concat([bytes, more]);
      if (bytes.length > size) socket.unshift(bytes.subarray(size));
      bytes = bytes.subarray(0, size);
      check?.(bytes);
      if (bytes.length === size) return bytes;
    } else {
      if (socket.errored) throw socket.errored;
      if (socket.readableEnded || socket.destroyed) throw new Error('the other side closed in the handshake');
      await readableOrOver(socket);
    }
  }
}

async function readableOrOver(socket) {
  const stop = new AbortController();
  try {
    // `once` throws what the socket failed with.
    await Promise.race(['readable', 'end', 'close'].map((name) => once(socket, name, { signal: stop.signal })));
  } finally {
    stop.abort();
  }
}

/** Say no more; read and drop until the other side has closed, or some time has passed; then close. */
async function linger(socket) {
  socket.end();
  socket.resume();
  await new Promise((resolve) => {
    const timer = setTimeout(resolve, LINGER);
    for (const name of ['end', 'close']) socket.once(name, () => { clearTimeout(timer); resolve(); });
  });
  socket.destroy();
}
