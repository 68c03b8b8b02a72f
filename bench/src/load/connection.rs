//! One HTTP/1.1 connection of the crowd: never blocks, carries one request at a time, and reads of
//! an answer only what a buyer needs. A general client costs as much as the server does, and a
//! crowd on the server's own machine takes that from it.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};

use bytes::BytesMut;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};

use super::outcome::Answer;

/// The longest head and body that are believed, in bytes.
const ANSWER_MAX: usize = 256 * 1024;

/// Headers of one answer.
const HEADERS_MAX: usize = 32;

/// What a look at a connection brought.
pub(crate) enum Received {
    /// The whole answer.
    Answer(Answer),
    /// Nothing yet, or not all of it.
    Part,
    /// The connection is over.
    Lost,
}

/// A socket, and what came of an answer that is not whole yet.
pub(crate) struct Connection {
    socket: TcpStream,
    part: Vec<u8>,
}

impl Connection {
    /// Begins to connect. It stands once the socket can be written and [`Self::stands`] agrees.
    pub(crate) fn begin(address: SocketAddr) -> io::Result<Self> {
        let family = match address {
            SocketAddr::V4(_) => AddressFamily::INET,
            SocketAddr::V6(_) => AddressFamily::INET6,
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(family, SocketType::STREAM, flags, None)?;
        match connect(&socket, &address) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        let socket = TcpStream::from(socket);
        socket.set_nodelay(true)?;
        Ok(Self {
            socket,
            part: Vec::new(),
        })
    }

    /// Whether connecting went well.
    pub(crate) fn stands(&self) -> io::Result<()> {
        Ok(sockopt::socket_error(&self.socket)??)
    }

    /// Sends a request. Whether it arrived, only an answer tells.
    pub(crate) fn send(&mut self, request: &[u8]) -> io::Result<()> {
        self.part.clear();
        // It fits into the socket's buffer, which is empty: one request at a time.
        self.socket.write_all(request)
    }

    /// Reads what is there. `buffer` is anybody's: nearly always it holds a whole answer. Its body is
    /// kept behind those in `bodies`, because to allocate each costs more than to copy it.
    pub(crate) fn receive(&mut self, buffer: &mut [u8], bodies: &mut BytesMut) -> Received {
        let count = match self.socket.read(buffer) {
            Ok(0) => return Received::Lost,
            Ok(count) => count,
            Err(error) if is_early(&error) => return Received::Part,
            Err(_) => return Received::Lost,
        };
        let read = &buffer[..count];
        if self.part.is_empty() {
            let received = parse(read, bodies);
            if matches!(received, Received::Part) {
                self.part.extend_from_slice(read);
            }
            return received;
        }
        self.part.extend_from_slice(read);
        if self.part.len() > ANSWER_MAX {
            return Received::Lost;
        }
        parse(&self.part, bodies)
    }

    /// The socket, to be watched.
    pub(crate) fn socket(&self) -> &TcpStream {
        &self.socket
    }
}

fn is_early(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// Reads an answer with a Content-Length. One without, which no server of ours sends, cannot be
/// told from one that was cut off.
fn parse(bytes: &[u8], bodies: &mut BytesMut) -> Received {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut head = httparse::Response::new(&mut headers);
    let begins = match head.parse(bytes) {
        Ok(httparse::Status::Complete(begins)) => begins,
        Ok(httparse::Status::Partial) => return Received::Part,
        Err(_) => return Received::Lost,
    };
    let mut answer = Answer {
        status: head.code.unwrap_or(0),
        ..Answer::default()
    };
    let mut length = None;
    for header in head.headers {
        let name = header.name;
        if name.eq_ignore_ascii_case("content-length") {
            length = number(header.value);
        } else if name.eq_ignore_ascii_case("idempotency-replayed") {
            answer.replayed = header.value == b"true";
        } else if name.eq_ignore_ascii_case("retry-after") {
            answer.retry_after = number(header.value);
        } else if name.eq_ignore_ascii_case("connection") {
            answer.closes = header.value.eq_ignore_ascii_case(b"close");
        }
    }
    let end = length
        .and_then(|length| usize::try_from(length).ok())
        .and_then(|length| begins.checked_add(length));
    match end {
        Some(end) => match bytes.get(begins..end) {
            Some(body) => {
                bodies.extend_from_slice(body);
                answer.body = bodies.split().freeze();
                Received::Answer(answer)
            }
            None => Received::Part,
        },
        None => Received::Lost,
    }
}

fn number(digits: &[u8]) -> Option<u64> {
    std::str::from_utf8(digits).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &[u8] = b"HTTP/1.1 201 Created\r\nIdempotency-Replayed: true\r\nretry-after: 7\r\nContent-Length: 2\r\n\r\n{}";

    fn read(bytes: &[u8]) -> Received {
        parse(bytes, &mut BytesMut::new())
    }

    #[test]
    fn an_answer_is_read_once_it_is_whole() {
        for end in 0..WHOLE.len() {
            assert!(matches!(read(&WHOLE[..end]), Received::Part), "{end}");
        }
        let Received::Answer(answer) = read(WHOLE) else {
            panic!("not whole");
        };
        assert_eq!((answer.status, &answer.body[..]), (201, &b"{}"[..]));
        assert!(answer.replayed && !answer.closes);
        assert_eq!(answer.retry_after, Some(7));
    }

    #[test]
    fn what_has_no_length_or_is_no_http_is_a_lost_answer() {
        for bytes in [
            &b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"[..],
            b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            b"SSH-2.0-OpenSSH\r\n",
        ] {
            assert!(matches!(read(bytes), Received::Lost));
        }
    }
}
