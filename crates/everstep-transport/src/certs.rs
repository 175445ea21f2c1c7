//! The cluster's certificate authority and the certificates it issues.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::identity::crypto_provider;

/// The subject of every cluster CA; fixed, so that a loaded key is enough to sign again.
const CA_COMMON_NAME: &str = "everstep cluster CA";
/// Longest process name: one DNS label.
const NAME_BYTES_MAX: usize = 63;

/// What is wrong with a certificate, a key or the place where they lie.
#[derive(Debug, thiserror::Error)]
pub enum CertError {
    /// The file does not exist.
    #[error("{}: no such file; make the cluster's certificates with `everstep certs`", file.display())]
    Missing {
        /// The file looked for.
        file: PathBuf,
    },
    /// The file exists and making the CA again would orphan every certificate it signed.
    #[error("{}: exists already; remove the folder to start a new cluster CA", file.display())]
    Exists {
        /// The file that is in the way.
        file: PathBuf,
    },
    /// The file could not be read or written.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file holds something else.
    #[error("{}: not {expected}", file.display())]
    NotPem {
        /// The file.
        file: PathBuf,
        /// What it should have been.
        expected: &'static str,
    },
    /// The certificate does not verify against the cluster CA.
    #[error("{}: not signed by the cluster CA in {}: {detail}", file.display(), ca.display())]
    NotSigned {
        /// The certificate's file.
        file: PathBuf,
        /// The CA's file.
        ca: PathBuf,
        /// What the verifier said.
        detail: String,
    },
    /// The certificate is for somebody else.
    #[error("{}: the certificate is not for process `{name}`", file.display())]
    WrongName {
        /// The certificate's file.
        file: PathBuf,
        /// The process name that was asked for.
        name: String,
    },
    /// The private key does not belong to the certificate.
    #[error("{}: not the private key of {}", key.display(), certificate.display())]
    KeyMismatch {
        /// The key's file.
        key: PathBuf,
        /// The certificate's file.
        certificate: PathBuf,
    },
    /// The name cannot be put into a certificate.
    #[error(
        "process name `{name}`: allowed are 1 to 63 lower-case letters, digits and hyphens, a letter first, no hyphen last"
    )]
    BadName {
        /// The name.
        name: String,
    },
    /// Key generation or signing failed.
    #[error("cannot make a certificate: {0}")]
    Generate(#[from] rcgen::Error),
}

/// The certificate authority of one cluster: `ca.pem` and `ca.key` in a folder.
#[derive(Debug)]
pub struct ClusterCa {
    file: PathBuf,
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl ClusterCa {
    /// Makes a new CA in `dir`, which is created if need be: `ca.pem` (0644) and `ca.key` (0600).
    ///
    /// # Errors
    /// [`CertError::Exists`] if there is one already, [`CertError::Io`] if `dir` cannot be written.
    pub fn create(dir: &Path) -> Result<Self, CertError> {
        let (file, key_file) = (dir.join("ca.pem"), dir.join("ca.key"));
        for existing in [&file, &key_file] {
            if existing.exists() {
                return Err(CertError::Exists {
                    file: existing.clone(),
                });
            }
        }
        let key = KeyPair::generate()?;
        let pem = ca_params().self_signed(&key)?.pem();
        // The key first: a folder with a certificate and no key would look complete to a reader of `ca.pem` only.
        write_file(&key_file, key.serialize_pem().as_bytes(), 0o600)?;
        write_file(&file, pem.as_bytes(), 0o644)?;
        Ok(Self {
            file,
            pem,
            issuer: Issuer::new(ca_params(), key),
        })
    }

    /// Loads the CA that lies in `dir` and checks that its key and certificate belong together.
    ///
    /// # Errors
    /// [`CertError`] naming the file and what is wrong with it.
    pub fn load(dir: &Path) -> Result<Self, CertError> {
        let (file, key_file) = (dir.join("ca.pem"), dir.join("ca.key"));
        let key_text = read_file(&key_file)?;
        let key = std::str::from_utf8(&key_text)
            .ok()
            .and_then(|text| KeyPair::from_pem(text).ok())
            .ok_or(CertError::NotPem {
                file: key_file.clone(),
                expected: "a PEM private key (PKCS#8)",
            })?;
        let text = read_file(&file)?;
        certificate(&file, &text)?;
        let pem = String::from_utf8(text).map_err(|_| CertError::NotPem {
            file: file.clone(),
            expected: "a PEM certificate",
        })?;
        let ca = Self {
            file: file.clone(),
            pem,
            issuer: Issuer::new(ca_params(), key),
        };
        ca.sign("probe").map_err(|error| match error {
            CertError::NotSigned { .. } => CertError::KeyMismatch {
                key: key_file,
                certificate: file,
            },
            other => other,
        })?;
        Ok(ca)
    }

    /// [`load`](Self::load)s the CA in `dir`, or [`create`](Self::create)s it if neither of its files is there.
    ///
    /// # Errors
    /// Those of the two.
    pub fn load_or_create(dir: &Path) -> Result<Self, CertError> {
        if dir.join("ca.pem").exists() || dir.join("ca.key").exists() {
            Self::load(dir)
        } else {
            Self::create(dir)
        }
    }

    /// Issues the certificate of process `name` into `dir`: `<name>.pem`, `<name>.key` (0600), and a copy of `ca.pem`.
    ///
    /// An earlier certificate of that name is replaced; it stays valid for whoever holds its key.
    ///
    /// # Errors
    /// [`CertError::BadName`], [`CertError::Io`].
    pub fn issue(&self, name: &str, dir: &Path) -> Result<(), CertError> {
        let (pem, key) = self.sign(name)?;
        write_file(
            &dir.join(format!("{name}.key")),
            key.serialize_pem().as_bytes(),
            0o600,
        )?;
        write_file(&dir.join(format!("{name}.pem")), pem.as_bytes(), 0o644)?;
        let copy = dir.join("ca.pem");
        if copy != self.file {
            write_file(&copy, self.pem.as_bytes(), 0o644)?;
        }
        Ok(())
    }

    fn sign(&self, name: &str) -> Result<(String, KeyPair), CertError> {
        check_name(name)?;
        let mut params = CertificateParams::new(vec![name.to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // Every process both dials and listens.
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let signed = params.signed_by(&key, &self.issuer)?;
        let roots = roots(&self.file, self.pem.as_bytes())?;
        verify(signed.der(), name, &roots, &self.file, &self.file)?;
        Ok((signed.pem(), key))
    }
}

/// Refuses names that do not fit one lower-case DNS label.
pub(crate) fn check_name(name: &str) -> Result<(), CertError> {
    let good = name.len() <= NAME_BYTES_MAX
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && !name.ends_with('-')
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    if good {
        Ok(())
    } else {
        Err(CertError::BadName {
            name: name.to_owned(),
        })
    }
}

/// The trust anchors in a CA file.
pub(crate) fn roots(file: &Path, pem: &[u8]) -> Result<RootCertStore, CertError> {
    let mut roots = RootCertStore::empty();
    roots
        .add(certificate(file, pem)?)
        .map_err(|_| CertError::NotPem {
            file: file.to_owned(),
            expected: "an X.509 certificate",
        })?;
    Ok(roots)
}

/// The first certificate in a PEM file.
pub(crate) fn certificate(file: &Path, pem: &[u8]) -> Result<CertificateDer<'static>, CertError> {
    CertificateDer::from_pem_slice(pem).map_err(|_| CertError::NotPem {
        file: file.to_owned(),
        expected: "a PEM certificate",
    })
}

/// Checks a certificate against the cluster CA and the name of its process.
pub(crate) fn verify(
    certificate: &CertificateDer<'_>,
    name: &str,
    roots: &RootCertStore,
    file: &Path,
    ca: &Path,
) -> Result<(), CertError> {
    let not_signed = |detail: String| CertError::NotSigned {
        file: file.to_owned(),
        ca: ca.to_owned(),
        detail,
    };
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots.clone()), crypto_provider())
            .build()
            .map_err(|error| not_signed(error.to_string()))?;
    let server_name = ServerName::try_from(name).map_err(|_| CertError::BadName {
        name: name.to_owned(),
    })?;
    match verifier.verify_server_cert(certificate, &[], &server_name, &[], UnixTime::now()) {
        Ok(_) => Ok(()),
        Err(rustls::Error::InvalidCertificate(
            rustls::CertificateError::NotValidForName
            | rustls::CertificateError::NotValidForNameContext { .. },
        )) => Err(CertError::WrongName {
            file: file.to_owned(),
            name: name.to_owned(),
        }),
        Err(error) => Err(not_signed(error.to_string())),
    }
}

/// Reads a whole file, telling a missing one from an unreadable one.
pub(crate) fn read_file(file: &Path) -> Result<Vec<u8>, CertError> {
    fs::read(file).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => CertError::Missing {
            file: file.to_owned(),
        },
        _ => CertError::Io {
            file: file.to_owned(),
            source,
        },
    })
}

fn ca_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, CA_COMMON_NAME);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// Writes beside and renames, so that a reader never sees half a key and the mode is right from the first byte.
fn write_file(file: &Path, bytes: &[u8], mode: u32) -> Result<(), CertError> {
    let failed = |source| CertError::Io {
        file: file.to_owned(),
        source,
    };
    let dir = file.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(dir).map_err(failed)?;
    let mut beside = file.as_os_str().to_owned();
    beside.push(format!(".{}.new", std::process::id()));
    let beside = PathBuf::from(beside);
    let written = (|| {
        let mut out = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&beside)?;
        out.write_all(bytes)?;
        out.sync_all()?;
        fs::rename(&beside, file)
    })();
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&beside);
    }
    written.map_err(failed)
}

#[cfg(test)]
mod tests;
