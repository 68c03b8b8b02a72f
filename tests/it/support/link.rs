//! The cable between two processes, with one end that never moves: it can be stalled, cut, and led
//! to another server.

use std::{net::Ipv4Addr, time::Duration};

use secrecy::{ExposeSecret, SecretString};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};

/// A TCP forwarder. It ends with the test's runtime.
pub(crate) struct Link {
    pub(crate) port: u16,
    state: watch::Sender<State>,
}

#[derive(Clone, Copy)]
struct State {
    target: u16,
    stalled: bool,
    /// Nothing comes from the target; what goes to it does.
    held: bool,
    /// Connections of an earlier number are closed.
    cuts: u32,
}

impl Link {
    /// A link to a port of this machine.
    pub(crate) async fn to(target: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = watch::Sender::new(State {
            target,
            stalled: false,
            held: false,
            cuts: 0,
        });
        let states = state.clone();
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let states = states.clone();
                tokio::spawn(async move {
                    let target = states.borrow().target;
                    if let Ok(far) = TcpStream::connect((Ipv4Addr::LOCALHOST, target)).await {
                        let (near, far) = (near.into_split(), far.into_split());
                        tokio::select! {
                            () = forward(near.0, far.1, states.subscribe(), |state| state.stalled) => {}
                            () = forward(far.0, near.1, states.subscribe(), |state| {
                                state.stalled || state.held
                            }) => {}
                            () = until_cut(states.subscribe()) => {}
                        }
                    }
                });
            }
        });
        Self { port, state }
    }

    /// The address of a server, at this end.
    pub(crate) fn address(&self, url: &SecretString) -> SecretString {
        let (url, _) = url.expose_secret().rsplit_once(':').unwrap();
        format!("{url}:{}", self.port).into()
    }

    /// From now on nothing comes through. What is on its way is held, and lost when the link is cut.
    pub(crate) fn stall(&self) {
        self.state.send_modify(|state| state.stalled = true);
    }

    /// From now on nothing comes from the target, which still hears everything: a replica at this end
    /// looks alive, and gets nothing.
    pub(crate) fn hold(&self) {
        self.state.send_modify(|state| state.held = true);
    }

    /// Lets through what was held, and all that comes.
    pub(crate) fn release(&self) {
        self.state.send_modify(|state| state.held = false);
    }

    /// Leads connections that are made from now on to another port. Those that there are stay.
    pub(crate) fn lead_to(&self, target: u16) {
        self.state.send_modify(|state| state.target = target);
    }

    /// Breaks all connections, with all that is on its way.
    pub(crate) fn cut(&self) {
        self.state.send_modify(|state| state.cuts += 1);
    }
}

async fn until_cut(mut states: watch::Receiver<State>) {
    let cuts = states.borrow().cuts;
    let _ = states.wait_for(|state| state.cuts > cuts).await;
}

async fn forward(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut states: watch::Receiver<State>,
    waits: fn(&State) -> bool,
) {
    let mut bytes = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut bytes).await {
        if states.wait_for(|state| !waits(state)).await.is_err()
            || to.write_all(&bytes[..length]).await.is_err()
        {
            return;
        }
    }
    // The other direction may still have something to say.
    let _ = to.shutdown().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
}
