//! TLS on a listener: a certificate and its key from two files, which may change while it serves.

use std::{io, path::PathBuf, sync::Arc};

use tokio::{net::TcpStream, sync::watch};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, ServerConfig,
        crypto::aws_lc_rs,
        pki_types::{
            CertificateDer, PrivateKeyDer,
            pem::{self, PemObject},
        },
    },
    server::TlsStream,
};

/// A connection that is encrypted.
pub(super) type TlsSocket = TlsStream<TcpStream>;

/// What is offered, HTTP/2 first.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or has no certificate or key in it.
    #[error("{0}: {1}")]
    File(PathBuf, pem::Error),
    /// The two do not go together, or rustls does not know their kind.
    #[error("certificate and key: {0}")]
    Pair(#[from] rustls::Error),
}

/// Speaks TLS with whoever connects. Cheap to clone.
#[derive(Clone)]
pub struct Tls {
    certificate: PathBuf,
    key: PathBuf,
    config: watch::Sender<Arc<ServerConfig>>,
}

impl Tls {
    /// With the chain and the key in these PEM files.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn load(certificate: PathBuf, key: PathBuf) -> Result<Self, TlsError> {
        let config = watch::Sender::new(read(&certificate, &key)?);
        Ok(Self {
            certificate,
            key,
            config,
        })
    }

    /// Takes what is in the files by now, for connections from now on.
    ///
    /// # Errors
    /// [`TlsError`], and everything stays as it was.
    pub fn reload(&self) -> Result<(), TlsError> {
        self.config
            .send_replace(read(&self.certificate, &self.key)?);
        Ok(())
    }

    pub(super) async fn accept(&self, socket: TcpStream) -> io::Result<TlsSocket> {
        let config = self.config.borrow().clone();
        TlsAcceptor::from(config).accept(socket).await
    }
}

fn read(certificate: &PathBuf, key: &PathBuf) -> Result<Arc<ServerConfig>, TlsError> {
    let unreadable = |path: &PathBuf| {
        let path = path.clone();
        move |error| TlsError::File(path, error)
    };
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(unreadable(certificate))?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(unreadable(key))?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
    Ok(Arc::new(config))
}
