// The second implementation of the wire protocol of bokbok_trio, from docs/protocol.rst alone: connect and listen.

import net from 'node:net';
import { Connection } from './connection.mjs';
import { grease } from './handshake.mjs';
import { openAsClient, openAsServer } from './opening.mjs';
import { Wire } from './wire.mjs';

export { Connection } from './connection.mjs';
export * from './errors.mjs';
export { NotAuthenticated, Refused } from './handshake.mjs';
export { ProtocolError } from './packets.mjs';

const DEFAULTS = { mode: 'sealed', service: '', maxMessageSize: 64 * 1024 * 1024, maxRequests: 1000 };

/** The settings of one connection: with the options a new grease. */
function settle(settings) {
  return { ...DEFAULTS, ...settings, options: new Map([...(settings.options ?? []), grease()]) };
}

/**
 * Dial `address`, { host, port } or { path }, and open a connection as its client. `settings`: mode ('sealed' or
 * 'plain'); user and key (32 bytes) in mode sealed; service, maxMessageSize, maxRequests, options (a Map of names
 * to bytes), handshakeTimeout (ms), recordSize (bytes of plaintext, at most), wrap(wire), which gives a wire to be
 * used in its place, and those of Connection.
 */
export async function connect(address, settings) {
  const settled = settle(settings);
  const socket = net.connect({ ...address, allowHalfOpen: true, noDelay: true });
  socket.on('error', () => {}); // whoever reads the socket looks at what it failed with
  await new Promise((resolve, reject) => socket.once('connect', resolve).once('error', reject));
  const opened = await openAsClient(socket, settled);
  return started(socket, opened, { client: true, settings: settled });
}

/**
 * Listen at `address`, as above. `settings` as above, but keysOf(user), a list of keys, in mode sealed, and
 * refuse(user), which may give a [code, message]. `opened(connection)` and `failed(error)` are told of each client.
 * Resolves with the net.Server.
 */
export async function listen(address, settings, opened, failed = () => {}) {
  const server = net.createServer({ allowHalfOpen: true, noDelay: true }, async (socket) => {
    socket.on('error', () => {});
    const settled = settle(settings);
    try {
      const { user, ...rest } = await openAsServer(socket, settled);
      opened(started(socket, rest, { client: false, settings: settled }), user);
    } catch (error) {
      failed(error);
    }
  });
  await new Promise((resolve, reject) => server.once('error', reject).listen(address, resolve));
  return server;
}

function started(socket, { sealer, opener, theirs }, { client, settings }) {
  const wire = new Wire(socket, { sealer, opener }, settings.recordSize);
  const connection = new Connection(settings.wrap?.(wire) ?? wire, { client, theirs, settings });
  connection.start();
  return connection;
}
