//! Picks loopback ports.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, TcpListener};

use rand::Rng;

/// Ports below this one belong to well-known services.
const PORT_MIN: u16 = 10_240;
/// Random tries before the kernel is asked.
const TRIES: usize = 64;

/// The last session's port if it is still free, otherwise a free one outside the kernel's ephemeral range:
/// inside it, while a service is being restarted, any outgoing connection could take its port, even a
/// client's own reconnect, which then connects to itself.
pub(super) fn pick(last: Option<u16>) -> io::Result<u16> {
    if let Some(port) = last.filter(|port| is_free(*port)) {
        return Ok(port);
    }
    let ephemeral = ephemeral_min();
    if ephemeral > PORT_MIN {
        let mut random = rand::rng();
        for _ in 0..TRIES {
            let port = random.random_range(PORT_MIN..ephemeral);
            if is_free(port) {
                return Ok(port);
            }
        }
    }
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
        .local_addr()?
        .port())
}

/// Whether nobody listens there now.
pub(super) fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

fn ephemeral_min() -> u16 {
    fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")
        .ok()
        .and_then(|range| range.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_port_is_kept_unless_taken() {
        let port = pick(None).unwrap();
        assert_eq!(pick(Some(port)).unwrap(), port);
        let _taken = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
        assert_ne!(pick(Some(port)).unwrap(), port);
    }
}
