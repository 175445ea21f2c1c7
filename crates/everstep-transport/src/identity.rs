//! Who this process is: its certificate, its key and the CA it trusts.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::RootCertStore;
use rustls::client::{Resumption, verify_server_name};
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::cipher_suite::{
    TLS13_AES_128_GCM_SHA256, TLS13_CHACHA20_POLY1305_SHA256,
};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};

use crate::ALPN;
use crate::certs::{CertError, certificate, check_name, read_file, roots, verify};

/// A process's name, certificate and private key, and the cluster CA against which it checks its peers.
#[derive(Clone)]
pub struct Identity {
    name: String,
    certificate: CertificateDer<'static>,
    key: Arc<PrivateKeyDer<'static>>,
    roots: Arc<RootCertStore>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Identity {
    /// Loads `ca.pem`, `<name>.pem` and `<name>.key` from `dir` and checks that they belong together.
    ///
    /// # Errors
    /// [`CertError`] naming the file and what is wrong: missing, not PEM, not signed by this CA, not for `name`, or a
    /// key of another certificate.
    pub fn load(dir: &Path, name: &str) -> Result<Self, CertError> {
        check_name(name)?;
        let (ca_file, file) = (dir.join("ca.pem"), dir.join(format!("{name}.pem")));
        let key_file = dir.join(format!("{name}.key"));
        let roots = roots(&ca_file, &read_file(&ca_file)?)?;
        let certificate = certificate(&file, &read_file(&file)?)?;
        verify(&certificate, name, &roots, &file, &ca_file)?;
        let not_key = || CertError::NotPem {
            file: key_file.clone(),
            expected: "a PEM private key",
        };
        let key = PrivateKeyDer::from_pem_slice(&read_file(&key_file)?).map_err(|_| not_key())?;
        match CertifiedKey::from_der(
            vec![certificate.clone()],
            key.clone_key(),
            &crypto_provider(),
        ) {
            Ok(_) => {}
            Err(rustls::Error::InconsistentKeys(_)) => {
                return Err(CertError::KeyMismatch {
                    key: key_file,
                    certificate: file,
                });
            }
            Err(_) => return Err(not_key()),
        }
        Ok(Self {
            name: name.to_owned(),
            certificate,
            key: Arc::new(key),
            roots: Arc::new(roots),
        })
    }

    /// The process name in the certificate.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// TLS for dialling: shows our certificate, wants one of the CA for the name that is dialled.
    pub(crate) fn client_config(&self) -> Result<QuicClientConfig, rustls::Error> {
        let mut config = rustls::ClientConfig::builder_with_provider(crypto_provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(Arc::clone(&self.roots))
            .with_client_auth_cert(vec![self.certificate.clone()], self.key.clone_key())?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        // A resumed session would skip the certificates, which are what the peer's name rests on.
        config.resumption = Resumption::disabled();
        QuicClientConfig::try_from(config)
            .map_err(|error| rustls::Error::General(error.to_string()))
    }

    /// TLS for listening: shows our certificate, wants one of the CA.
    pub(crate) fn server_config(&self) -> Result<QuicServerConfig, rustls::Error> {
        let clients =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&self.roots), crypto_provider())
                .build()
                .map_err(|error| rustls::Error::General(error.to_string()))?;
        let mut config = rustls::ServerConfig::builder_with_provider(crypto_provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(clients)
            .with_single_cert(vec![self.certificate.clone()], self.key.clone_key())?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.send_tls13_tickets = 0;
        QuicServerConfig::try_from(config)
            .map_err(|error| rustls::Error::General(error.to_string()))
    }

    /// A secret that survives a restart: with it a new process can tell peers that its predecessor's connections died.
    pub(crate) fn reset_secret(&self) -> [u8; 32] {
        blake3::derive_key(
            "everstep-transport 1 stateless reset",
            self.key.secret_der(),
        )
    }
}

/// Whether the certificate that a peer has shown is for process `name`.
pub(crate) fn certificate_names(certificate: &CertificateDer<'_>, name: &str) -> bool {
    let (Ok(parsed), Ok(server_name)) = (
        ParsedCertificate::try_from(certificate),
        ServerName::try_from(name),
    ) else {
        return false;
    };
    verify_server_name(&parsed, &server_name).is_ok()
}

/// ring, with AES-128-GCM first: it is the fastest suite wherever the CPU has AES instructions.
pub(crate) fn crypto_provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![TLS13_AES_128_GCM_SHA256, TLS13_CHACHA20_POLY1305_SHA256],
        ..rustls::crypto::ring::default_provider()
    })
}
